import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline
from transformers.pytorch_utils import Conv1D

from pbsp.errors import ConfigError, FormatError
from pbsp.integrations.modules import replace_module
from pbsp.integrations.transformers import PbspQuantizationConfig, attach
from pbsp.packed_linear import PackedLinear
from pbsp.storage.checkpoint import packed_digest
from random_planes import packed_model, random_planes
from saved import edit_config, edit_tensors, load, logits, packed_linears
from tiny import CONFIGS, FAMILIES, tiny_model, tiny_tokenizer, tiny_tokens

QUERY = "model.layers.0.self_attn.q_proj"
LOAD = "import sys, torch, transformers{more}\nload = transformers.AutoModelForCausalLM.from_pretrained\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved packed model of any architecture, made once: (folder, logits)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = packed_model(name)
            model.save_pretrained(folder)
            made[name] = (folder, logits(model))
        return made[name]

    return make


@pytest.fixture
def llama(saved, tmp_path):
    """A folder of a packed tied Llama that a test may damage."""
    return shutil.copytree(saved("llama")[0], tmp_path / "llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_loads_what_was_saved(saved, name):
    folder, expected = saved(name)
    model = load(folder)
    assert torch.equal(logits(model), expected)
    assert packed_linears(model).keys() == packed_linears(packed_model(name)).keys()
    original, loaded = packed_model(name).state_dict(), model.state_dict()
    assert original.keys() == loaded.keys()
    assert all(torch.equal(original[key], loaded[key]) for key in original)
    assert {module.conv1d for module in packed_linears(model).values()} == {name == "gpt2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_saving_again_writes_the_same_bytes(saved, name, tmp_path):
    folder, _ = saved(name)
    load(folder).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_a_fresh_process_computes_the_same_logits(saved, fresh):
    script = LOAD.format(more=", pbsp.integrations.transformers") + (
        "for name in sys.argv[1:]:\n"
        "    model, tokens = load(name), torch.load(name + '/tokens.pt')\n"
        "    with torch.no_grad(): torch.save(model(tokens).logits, name + '/logits.pt')\n"
    )
    folders = [str(saved(name)[0]) for name in CONFIGS]
    for folder in folders:
        torch.save(tiny_tokens(), f"{folder}/tokens.pt")
    ended = fresh(script, *folders)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name in CONFIGS:
        folder, expected = saved(name)
        assert torch.equal(torch.load(folder / "logits.pt"), expected)


def test_a_process_without_pbsp_stops_instead_of_loading_noise(saved, fresh):
    script = LOAD.format(more="") + "load(sys.argv[1])"
    result = fresh(script, saved("llama")[0])
    assert result.returncode != 0
    assert "q_proj.weight | MISMATCH" in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_equals_that_of_the_dense_reconstruction(saved, name):
    folder, _ = saved(name)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    tokens = tiny_tokens(2, 8)
    packed = load(folder).generate(tokens, **options)
    assert torch.equal(load(folder).dequantize().generate(tokens, **options), packed)


def test_pipelines_generate_with_packed_models(saved):
    tokenizer, model = tiny_tokenizer(), load(saved("llama")[0])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipe("abc", return_full_text=False, **settings)[0]["generated_text"]
    expected = model.generate(torch.tensor([tokenizer("abc").input_ids]), **settings)
    assert text == tokenizer.decode(expected[0, 3:], skip_special_tokens=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_dequantized_models_save_and_load_as_plain_ones(saved, name, tmp_path):
    folder, expected = saved(name)
    model = load(folder).dequantize()
    assert not packed_linears(model)
    assert any(isinstance(module, Conv1D) for module in model.modules()) == (name == "gpt2")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = load(tmp_path)
    torch.testing.assert_close(logits(plain), expected)
    assert plain.state_dict().keys() == tiny_model(name).state_dict().keys()


def test_dequantized_models_are_of_one_dtype(saved):
    model = load(saved("opt")[0])
    assert {tensor.dtype for tensor in model.to(torch.bfloat16).dequantize().parameters()} == {torch.bfloat16}
    model = load(saved("opt")[0]).dequantize(torch.float16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_tied_embeddings_are_stored_once_and_tied_after_loading(saved, name):
    folder, _ = saved(name)
    tied = name == "llama"
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.shape == (256, 64) for tensor in stored.values()) == (1 if tied else 2)
    model = load(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_work(saved, device_map):
    folder, expected = saved("llama")
    assert torch.equal(logits(load(folder, device_map=device_map)), expected)


def test_layers_can_be_offloaded_to_disk(saved, tmp_path):
    folder, expected = saved("llama-untied")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    assert torch.equal(logits(load(folder, device_map=places, offload_folder=tmp_path)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_leaves_the_packed_tensors_alone(saved, dtype):
    folder, _ = saved("qwen2")
    model = load(folder, dtype=dtype)
    assert model.dtype == dtype
    assert logits(model).dtype == dtype
    expected = packed_linears(load(folder))
    for moved in (model, load(folder).to(dtype)):
        for name, module in packed_linears(moved).items():
            assert packed_digest(module.packed) == packed_digest(expected[name].packed)
            assert module.bias is None or module.bias.dtype == dtype


def test_packed_linears_take_less_than_a_quarter_of_16_bit_memory(saved):
    model = load(saved("llama")[0])
    for module in packed_linears(model).values():
        tensors = [*module.parameters(), *module.buffers()]
        assert sum(tensor.nbytes for tensor in tensors) < module.in_features * module.out_features * 2 / 4


def test_base_model_loads_from_a_causal_model_and_back(saved, tmp_path):
    folder, expected = saved("llama")
    base = AutoModel.from_pretrained(folder)
    assert packed_linears(base).keys() == {
        name.removeprefix("model.") for name in packed_linears(load(folder))
    }
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_classifier_may_bring_its_own_head_but_not_a_language_model(saved, tmp_path):
    folder, _ = saved("llama-untied")
    assert packed_linears(AutoModelForSequenceClassification.from_pretrained(folder))
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        load(tmp_path)


def test_shards_load_and_a_deleted_one_is_named(tmp_path):
    model = packed_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert torch.equal(logits(load(tmp_path)), logits(model))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(FormatError, match=f"{shard.name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        f"{QUERY}.weight",
        f"{QUERY}.weight_scale",
        f"{QUERY}.weight_scale_offset",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_deleted_tensor_is_named(llama, key):
    edit_tensors(llama, lambda tensors: tensors.pop(key))
    with pytest.raises(FormatError, match=f"lack .*{key}(,|$)"):
        load(llama)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_offset"])
def test_a_flipped_bit_is_found_in_every_packed_tensor(llama, suffix):
    edit_tensors(
        llama, lambda tensors: tensors[f"{QUERY}.{suffix}"].view(torch.uint8).view(-1)[0].bitwise_xor_(1)
    )
    with pytest.raises(FormatError, match=f"layer {QUERY}: the SHA-256"):
        load(llama)


@pytest.mark.parametrize("left", [0, 4, 100, -100])
def test_a_truncated_file_is_named(llama, left):
    file = llama / "model.safetensors"
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    with pytest.raises(FormatError, match=r"model\.safetensors cannot be read"):
        load(llama)


def test_invalid_codes_are_refused_even_with_a_matching_digest(llama):
    packed = load(llama).get_submodule(QUERY).packed
    packed.codes[0, :11] = 255

    edit_tensors(llama, lambda tensors: tensors.update({f"{QUERY}.weight": packed.codes}))
    edit_config(llama, lambda config: config["layers"][QUERY].update(sha256=packed_digest(packed)))
    with pytest.raises(FormatError, match=f"layer {QUERY}: plane 0 holds code 2047"):
        load(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": "5:8+2:8"}, f"layer {QUERY}: the SHA-256"),  # codes as wide as those of 4:8
        ({"patterns": "2:8+4:8"}, f"layer {QUERY}: the SHA-256"),
        ({"patterns": "4:8"}, rf"tensor {QUERY}\.weight is U8 \[64, 18\].*calls for U8 \[64, 11\]"),
        ({"patterns": "4:9"}, f"layer {QUERY}: pattern 4:9 does not tile"),
        ({"patterns": "none"}, f"layer {QUERY}: 'none' is not a pattern"),
        ({"scale_block": 64}, rf"tensor {QUERY}\.weight_scale "),
        ({"scale_block": 49}, f"layer {QUERY}: the SHA-256"),
        ({"scale_block": 0}, f"layer {QUERY}: scale_block is 0"),
        ({"out_features": 32}, f"layer {QUERY}: .*32"),
        ({"in_features": "64"}, f"layer {QUERY}: in_features is '64', not int"),
        ({"bias": True}, f"layer {QUERY}: .*bias"),
        ({"sha256": "0" * 63}, f"layer {QUERY}: sha256"),
        ({"mu": 0}, f"layer {QUERY}: its entry must have exactly"),
        ({"layout": "paper"}, f"layer {QUERY}: its entry must have exactly .*salient_parts"),
        ({"layout": "plane"}, f"layer {QUERY}: layout is 'plane'; this pbsp knows planes, paper, rows"),
    ],
)
def test_a_wrong_entry_is_refused_by_the_layers_name(llama, change, message):
    edit_config(llama, lambda config: config["layers"][QUERY].update(change))
    with pytest.raises(FormatError, match=message):
        load(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format_version=2), "format version 2"),
        (lambda config: config.update(surprise=1), "unknown keys .*surprise"),
        (lambda config: config.update(format_version="1"), "format version '1'"),
        (lambda config: config.pop("format_version"), "format version None"),
        (lambda config: config.update(layers={}), "_proj.*does not list"),
        (lambda config: config.update(layers=[1]), "layers in quantization_config"),
        (lambda config: config.update(layers={"a": [1]}), "layer a: its entry"),
        (lambda config: config.pop("provenance"), "provenance in quantization_config is missing"),
        (lambda config: config["layers"].pop(QUERY), f"{QUERY}.*does not list"),
        (lambda config: config["layers"].update(nowhere=config["layers"][QUERY]), "layer nowhere: "),
        (
            lambda config: config["layers"].update({"model.norm": config["layers"][QUERY]}),
            "layer model.norm: ",
        ),
    ],
)
def test_a_wrong_config_is_refused(llama, change, message):
    edit_config(llama, change)
    with pytest.raises(FormatError, match=message):
        load(llama)


def test_wrong_shapes_and_dtypes_are_refused_from_the_headers(llama):
    for change in (lambda tensor: tensor[:-1], lambda tensor: tensor.to(torch.int8)):
        edit_tensors(
            llama, lambda t, c=change: t.update({f"{QUERY}.weight_scale": c(t[f"{QUERY}.weight_scale"])})
        )
        with pytest.raises(FormatError, match=rf"tensor {QUERY}\.weight_scale is "):
            load(llama)


def test_the_config_is_refused_as_a_request_to_compress(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot compress one while it loads"):
        load(tmp_path, quantization_config=PbspQuantizationConfig())


def test_a_model_without_packed_linears_cannot_be_attached():
    with pytest.raises(FormatError, match="no packed linear"):
        attach(tiny_model("llama"), PbspQuantizationConfig())


def test_config_records_what_it_was_given(llama):
    config = load(llama).config.quantization_config
    assert config.left_uncompressed == {"lm_head": "head"}
    assert config.provenance == {"seed": 0}
    stored = json.loads((Path(llama) / "config.json").read_text())["quantization_config"]
    assert stored == config.to_dict()
    assert stored["layers"][QUERY]["patterns"] == "4:8+2:8"
    assert PbspQuantizationConfig.from_dict(stored).to_dict() == stored


def test_attaching_again_updates_the_digests_of_changed_layers(tmp_path):
    model = packed_model("llama")
    replace_module(model, QUERY, PackedLinear.of(random_planes("2:8", 64, 64)))
    attach(model, model.config.quantization_config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_replace_module_notes_a_conv1d_and_keeps_the_mode():
    model = nn.Sequential(nn.Sequential(Conv1D(16, 32))).eval()
    module = PackedLinear.of(random_planes("4:8", 16, 32))
    replace_module(model, "0.0", module)
    assert model[0][0] is module
    assert module.conv1d
    replace_module(model, "0.0", again := PackedLinear.of(random_planes("2:8", 16, 32)))
    assert again.conv1d
    assert not module.training


def test_a_tied_weight_cannot_be_a_packed_layer(llama):
    def pack_the_head(config):
        config["layers"]["lm_head"] = {**config["layers"][QUERY], "out_features": 256}

    edit_config(llama, pack_the_head)
    with pytest.raises(FormatError, match="layer lm_head: its weight is tied to another"):
        load(llama)
