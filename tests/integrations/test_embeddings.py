import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.embedding_rounding import round_head
from pbsp.errors import FormatError
from pbsp.methods.integers import rounded_rows
from pbsp.packed_embedding import PackedEmbedding, PackedHead
from pbsp.quantization.rows import dequantize_rows, quantize_rows
from pbsp.solver.hessian import damped, inverse_factor
from saved import edit_config, edit_tensors
from tiny import CONFIGS, tiny_model, tiny_tokens
from variants import layer_problem

PLAIN = [name for name in CONFIGS if not name.startswith("gemma")]


def compressed(name, folder, bits=8):
    model = tiny_model(name)
    windows = Windows(tiny_tokens(2, 16), text="random", split="test", text_digest="0")
    report = pbsp.compress(model, None, Config(pattern="4:8", embeddings=str(bits)), corpus=windows)
    pbsp.save_compressed(model, None, folder, report)
    return model, report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a tied Llama, which no test changes."""
    folder = tmp_path_factory.mktemp("embeddings") / "out"
    compressed("llama", folder)
    return folder


@pytest.fixture
def llama(saved, tmp_path):
    """The same, which a test may damage."""
    return shutil.copytree(saved, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 8) for name in PLAIN), ("llama", 4), ("llama-untied", 4)]
)
@torch.no_grad()
def test_quantized_embeddings_survive_saving_and_loading(name, bits, tmp_path):
    model, report = compressed(name, tmp_path / "out", bits)
    assert report.embeddings == f"{bits} bit"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=model.dtype)
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)
    assert isinstance(loaded.get_output_embeddings(), PackedHead)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (CONFIGS[name].tie_word_embeddings is True)
    tokens = tiny_tokens(1)
    logits = model(tokens).logits
    assert torch.equal(loaded(tokens).logits, logits)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (tmp_path / part / "model.safetensors" for part in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    dense = loaded.dequantize()
    assert type(dense.get_input_embeddings()) is nn.Embedding
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == tied
    torch.testing.assert_close(dense(tokens).logits, logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
@torch.no_grad()
def test_what_the_head_multiplies_with_is_rounded_under_its_inputs(name, tmp_path):
    model, _ = compressed(name, tmp_path / "out", 4)
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    for window in tiny_tokens(2, 16):
        model(window[None])
    inputs = torch.cat(seen)
    original = tiny_model(name).half()
    for packed, source in (
        (head, original.get_output_embeddings()),
        (model.get_input_embeddings(), original.get_input_embeddings()),
    ):
        nearest = quantize_rows(source.weight, 4)
        error, usual = (
            float((inputs @ (dequantize_rows(rows, 4) - source.weight).double().T).square().sum())
            for rows in (packed.weight, nearest)
        )
        if packed is head or name == "llama":
            assert error < 0.8 * usual
        else:
            assert torch.equal(packed.weight, nearest)


def test_rounding_is_that_of_the_method_in_any_number_of_parts(monkeypatch):
    weight, moment = layer_problem(rows=10, columns=64)
    expected = rounded_rows(weight, inverse_factor(damped(moment, 0.1)).float(), 4)
    assert torch.equal(round_head(weight, 4, moment), expected)
    monkeypatch.setattr("pbsp.embedding_rounding._ROWS_AT_ONCE", 3)
    assert torch.equal(round_head(weight, 4, moment), expected)
    assert torch.equal(round_head(weight, 8, moment), quantize_rows(weight, 8))
    assert torch.equal(round_head(weight, 4, None), quantize_rows(weight, 4))


@torch.no_grad()
def test_they_change_little(tmp_path):
    model, _ = compressed("llama-untied", tmp_path / "out")
    exact = tiny_model("llama-untied")
    windows = Windows(tiny_tokens(2, 16), text="random", split="test", text_digest="0")
    pbsp.compress(exact, None, Config(pattern="4:8"), corpus=windows)
    tokens = tiny_tokens(1)
    change = (model(tokens).logits - exact(tokens).logits).float().norm() / exact(
        tokens
    ).logits.float().norm()
    assert 0 < change < 0.03


def test_tables_that_do_more_stay_as_they_are(tmp_path):
    model, report = compressed("gemma3", tmp_path / "out")
    assert report.embeddings.startswith("16 bit: Gemma3")
    assert not isinstance(model.get_input_embeddings(), PackedEmbedding)


@pytest.mark.parametrize("name", ["llama-untied", "gpt-neox"])
def test_a_headless_model_loads_too(name, tmp_path):
    compressed(name, tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)


def flip(tensors):
    tensors["model.embed_tokens.weight"][3, 5] ^= 1


def shorten(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [(flip, "embedding model.embed_tokens: the SHA-256"), (shorten, "model.embed_tokens.weight is U8")],
)
def test_damaged_rows_are_refused(change, message, llama):
    edit_tensors(llama, change)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rows", 255, "embedding model.embed_tokens is 255x64"),
        ("rows", -1, "rows is of a wrong type or out of range"),
        ("columns", "64", "columns is of a wrong type"),
        ("other", 1, "must have exactly the keys"),
        ("bits", 5, "rows of 64 columns have no 5-bit form"),
    ],
)
def test_wrong_entries_are_refused(key, value, message, llama):
    def change(config):
        config["embeddings"]["model.embed_tokens"][key] = value

    edit_config(llama, change)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(llama)


def test_rows_that_the_config_does_not_list_are_refused(llama):
    edit_config(llama, lambda config: config.update(embeddings={}))
    with pytest.raises((FormatError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(llama)
