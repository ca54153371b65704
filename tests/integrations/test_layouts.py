"""Models with layers of other layouts than `planes`, and of `paper` beside `planes`, in transformers."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from pbsp.errors import FormatError
from pbsp.inspection import inspect_folder
from pbsp.integrations.modules import replace_module
from pbsp.packed_linear import PackedLinear
from pbsp.report import LayerReport
from pbsp.storage.checkpoint import packed_digest
from random_grouped import alternating, random_grouped
from random_low_rank import random_low_rank
from random_planes import packed_model, random_planes
from random_rows import random_rows
from saved import edit_config, edit_tensors, load, logits, packed_linears
from tiny import tiny_model, tiny_tokens

QUERY = "model.layers.0.self_attn.q_proj"
NAMES = ["llama", "gpt2", "qwen2"]
MAKERS = {
    "paper": partial(random_grouped, parts=2),
    "mixed": alternating,
    "rows": random_rows,
    "integers": lambda _, rows, columns, seed: random_planes(f"{2 + seed % 3} bit", rows, columns, seed=seed),
    "lattice": lambda _, rows, columns, seed: random_planes("e8-12+e8-8", rows, columns, seed=seed),
    "low-rank": lambda _, rows, columns, seed: random_low_rank(rows, columns, 11, seed=seed),
}
LAYOUTS = {
    "paper": {"paper"},
    "mixed": {"paper", "planes"},
    "rows": {"rows"},
    "integers": {"planes"},
    "lattice": {"planes"},
    "low-rank": {"low-rank"},
}


QUICK = {
    ("llama", "mixed"),
    ("gpt2", "paper"),
    ("qwen2", "mixed"),
    ("gpt2", "rows"),
    ("llama", "low-rank"),
    ("qwen2", "integers"),
    ("gpt2", "lattice"),
}
CASES = [
    pytest.param((name, kind), marks=() if (name, kind) in QUICK else pytest.mark.slow, id=f"{name}-{kind}")
    for name in NAMES
    for kind in MAKERS
]


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """A saved model: (folder, model)."""
    name, kind = request.param
    folder = tmp_path_factory.mktemp(name)
    model = packed_model(name, "4:8", make=MAKERS[kind])
    model.save_pretrained(folder)
    assert {module.form.layout for module in packed_linears(model).values()} == LAYOUTS[kind]
    return folder, model


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A folder of a packed tied Llama, which no test changes."""
    folder = tmp_path_factory.mktemp("paper")
    packed_model("llama", "4:8", make=MAKERS["paper"]).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(paper, tmp_path):
    """The same, which a test may damage."""
    return shutil.copytree(paper, tmp_path / "llama")


def test_loads_what_was_saved_and_saves_the_same_bytes(saved, tmp_path):
    folder, model = saved
    loaded = load(folder)
    assert torch.equal(logits(loaded), logits(model))
    original, state = model.state_dict(), loaded.state_dict()
    assert original.keys() == state.keys()
    assert all(torch.equal(original[key], state[key]) for key in original)
    loaded.save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_greedy_generation_equals_that_of_the_dense_reconstruction(saved):
    folder, _ = saved
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    tokens = tiny_tokens(2, 8)
    packed = load(folder).generate(tokens, **options)
    assert torch.equal(load(folder).dequantize().generate(tokens, **options), packed)


def test_dense_is_the_representations_bit_for_bit(saved):
    _, model = saved
    for module in packed_linears(model).values():
        assert torch.equal(module.dense(), module.packed.unpack().dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_leaves_the_packed_tensors_alone(saved, dtype):
    folder, model = saved
    expected = packed_linears(model)
    for moved in (load(folder, dtype=dtype), load(folder).to(dtype)):
        assert logits(moved).dtype == dtype
        for name, module in packed_linears(moved).items():
            assert packed_digest(module.packed) == packed_digest(expected[name].packed)
            assert torch.equal(module.dense(), expected[name].dense())


def test_inspection_counts_what_the_report_says_and_every_byte_once(saved, tmp_path):
    folder, model = saved
    folder = shutil.copytree(folder, tmp_path / "copy")
    # Tied heads are no linears of their own in the file; compress does not list them.
    edit_config(folder, lambda config: config.update(left_uncompressed={}))
    found = inspect_folder(folder)
    linears = packed_linears(model)
    assert {layer.name for layer in found.layers} == linears.keys()
    for layer in found.layers:
        assert replace(layer, output_error=0.0) == LayerReport.of(layer.name, linears[layer.name], 0.0)
    assert sum(found.bytes_by_kind.values()) == found.file_bytes
    tensors = [tensor for module in linears.values() for tensor in module.packed.tensors().items()]
    for kind, suffix in (
        ("groups and residual signs", "weight_group"), ("scalars", "weight_scalar"),
        ("salient bitmaps", "weight_salient"), ("signs of columns", "weight_column"),
    ):  # fmt: skip
        assert found.bytes_by_kind.get(kind, 0) == sum(
            tensor.nbytes for name, tensor in tensors if name == suffix
        )
    layouts = {module.form.layout for module in linears.values()}
    assert ("plane codes" in found.bytes_by_kind) == ("planes" in layouts)
    assert ("integers and scales" in found.bytes_by_kind) == ("rows" in layouts)


def test_layers_say_their_layout_in_config_json(saved):
    folder, model = saved
    entries = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    for name, module in packed_linears(model).items():
        assert entries[name]["layout"] == module.form.layout
        assert ("salient_parts" in entries[name]) == (module.form.layout == "paper")


def test_a_process_without_pbsp_stops_instead_of_loading_noise(llama, fresh):
    script = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    result = fresh(script, llama)
    assert result.returncode != 0
    assert "q_proj.weight | MISMATCH" in " ".join(result.stderr.split())


@pytest.mark.parametrize("suffix", ["weight", "weight_group", "weight_scalar", "weight_salient"])
def test_damage_to_any_tensor_is_found(llama, suffix):
    key = f"{QUERY}.{suffix}"
    whole = load_file(llama / "model.safetensors")
    edit_tensors(llama, lambda tensors: tensors[key].view(torch.uint8).view(-1)[0].bitwise_xor_(1))
    with pytest.raises(FormatError, match=f"layer {QUERY}: the SHA-256"):
        load(llama)
    edit_tensors(llama, lambda tensors: tensors.update({key: whole[key][:-1]}))
    with pytest.raises(FormatError, match=f"tensor {key} is "):
        load(llama)
    edit_tensors(llama, lambda tensors: tensors.pop(key))
    with pytest.raises(FormatError, match=f"lack .*{key}(,|$)"):
        load(llama)


def test_values_without_meaning_are_refused_even_with_a_matching_digest(llama):
    module = load(llama).get_submodule(QUERY)
    module.weight_scalar[3, 0, 4] = 0x7C00
    edit_tensors(llama, lambda tensors: tensors.update({f"{QUERY}.weight_scalar": module.weight_scalar}))
    edit_config(llama, lambda config: config["layers"][QUERY].update(sha256=packed_digest(module.packed)))
    with pytest.raises(FormatError, match=f"layer {QUERY}: weight_scalar holds a NaN or an infinity"):
        load(llama)


def test_scalars_in_a_float_type_are_refused(llama):
    key = f"{QUERY}.weight_scalar"
    edit_tensors(llama, lambda tensors: tensors.update({key: tensors[key].view(torch.float16)}))
    with pytest.raises(FormatError, match=rf"tensor {key} is F16 .*calls for I16"):
        load(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": "5:8"}, rf"tensor {QUERY}\.weight_group "),
        ({"patterns": "4:8+4:8"}, f"layer {QUERY}: layout paper has one N:M"),
        ({"patterns": "4:9"}, f"layer {QUERY}: pattern 4:9 does not tile"),
        ({"scale_block": 64}, rf"tensor {QUERY}\.weight_scalar "),
        ({"scale_block": 49}, f"layer {QUERY}: the SHA-256"),
        ({"salient_parts": 4}, rf"tensor {QUERY}\.weight_salient "),
        ({"salient_parts": 3}, f"layer {QUERY}: 3 salient_parts do not divide 64 rows"),
        ({"salient_parts": 0}, f"layer {QUERY}: salient_parts is 0"),
        ({"layout": "planes"}, f"layer {QUERY}: its entry must have exactly"),
        ({"layout": ["paper"]}, f"layer {QUERY}: layout is "),
    ],
)
def test_a_wrong_entry_is_refused_by_the_layers_name(llama, change, message):
    edit_config(llama, lambda config: config["layers"][QUERY].update(change))
    with pytest.raises(FormatError, match=message):
        load(llama)


def test_a_packed_layer_that_the_config_does_not_list_is_named(llama):
    edit_config(llama, lambda config: config["layers"].pop(QUERY))
    with pytest.raises(FormatError, match=f"{QUERY}.*does not list"):
        load(llama)


def test_a_dense_linear_comes_back_as_the_kind_that_stood_there():
    model = tiny_model("gpt2")
    name = "transformer.h.0.attn.c_attn"
    bias = model.get_submodule(name).bias
    matrix = random_grouped("4:8", 192, 64, parts=3)
    replace_module(model, name, PackedLinear.of(matrix, bias))
    expected = logits(model)
    assert model.get_submodule(name).conv1d
    weight = model.get_submodule(name).dense()
    assert torch.equal(weight, matrix.dense())
    plain = tiny_model("gpt2")
    plain.get_submodule(name).weight.data = weight.T.contiguous()
    torch.testing.assert_close(logits(plain), expected)
