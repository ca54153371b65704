import copy
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.commands.tables import layer_table, summary_table
from pbsp.errors import FormatError, ModelError
from pbsp.inspection import inspect_folder
from tiny import CONFIGS, tiny_model, tiny_tokenizer, tiny_tokens


def compressed(folder, name="llama", model=None):
    model = model or tiny_model(name)
    windows = Windows(tiny_tokens(2, 16), text="random", split="test", text_digest="0")
    report = pbsp.compress(model, None, pbsp.Config(pattern="2:8"), corpus=windows)
    pbsp.save_compressed(model, tiny_tokenizer(), folder, report)
    return report


@pytest.fixture
def folder(tmp_path):
    compressed(tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder, change):
    """Save the folder's tensors again after `change` has worked on them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_the_reports_and_every_byte_has_one_kind(name, tmp_path):
    report = compressed(tmp_path / "out", name)
    found = inspect_folder(tmp_path / "out")
    assert found.layers == report.layers
    assert found.stored_bits == pytest.approx(report.stored_bits)
    assert found.nominal_bits == pytest.approx(report.nominal_bits)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert found.file_bytes == sum(path.stat().st_size for path in files)
    assert sum(found.bytes_by_kind.values()) == found.file_bytes
    assert all(size >= 0 for size in found.bytes_by_kind.values())
    packed = found.bytes_by_kind["plane codes"] + found.bytes_by_kind["plane scales"]
    weights = sum(layer.weights for layer in found.layers)
    assert packed * 8 == pytest.approx(found.stored_bits * weights)


@pytest.mark.parametrize(("name", "embeddings"), [("llama", 1), ("llama-untied", 2)])
def test_embeddings_count_once_when_tied(name, embeddings, tmp_path):
    compressed(tmp_path / "out", name)
    found = inspect_folder(tmp_path / "out")
    assert found.bytes_by_kind["embeddings and head"] == embeddings * 256 * 64 * 2


def test_layers_come_in_the_models_order_not_the_alphabets(tmp_path):
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 11
    report = compressed(tmp_path / "out", model=AutoModelForCausalLM.from_config(config).eval())
    (tmp_path / "out" / "pbsp_report.json").unlink()
    found = inspect_folder(tmp_path / "out")
    assert [layer.name for layer in found.layers] == [layer.name for layer in report.layers]


def test_learned_positions_count_as_embeddings(tmp_path):
    compressed(tmp_path / "out", "gpt2")
    found = inspect_folder(tmp_path / "out")
    assert found.bytes_by_kind["embeddings and head"] == (256 + 128) * 64 * 2


def test_without_the_report_errors_are_unknown_and_the_rest_still_counts(folder):
    whole = inspect_folder(folder)
    (folder / "pbsp_report.json").unlink()
    found = inspect_folder(folder)
    assert found.stored_bits == whole.stored_bits
    assert all(math.isnan(layer.output_error) for layer in found.layers)
    assert all(layer["output_error"] is None for layer in json.loads(json.dumps(found.to_dict()))["layers"])
    console = Console(width=120, record=True, quiet=True)
    console.begin_capture()
    console.print(summary_table(found), layer_table(found.layers))
    assert "nan" not in console.end_capture()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ModelError, match="is not a folder"):
        inspect_folder(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no config\.json"):
        inspect_folder(tmp_path)
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="not compressed by pbsp"):
        inspect_folder(tmp_path / "plain")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "unheard of"}',
        '{"model_type": 3}',
        '{"model_type": null}',
        "[" * 10**5,
    ],
)
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is not a model's configuration") as caught:
        inspect_folder(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_act": ""}, {"dtype": []}, {"head_dim": 0},
     {"vocab_size": 10**30}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**9}],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_refused_soon(folder, wrong):
    edit_config(folder, lambda config: config.update(wrong))
    with pytest.raises((ModelError, FormatError), match=r"config\.json|calls for"):
        inspect_folder(folder)


def test_damage_is_named(folder):
    name = "model.layers.0.mlp.up_proj"
    good = (folder / "config.json").read_text()
    for change, message in (
        (lambda q: q.pop("layers"), "layers in quantization_config is missing"),
        (lambda q: q["layers"].clear(), "no packed layer"),
        (lambda q: q["layers"][name].pop("bias"), f"layer {name}"),
        (lambda q: q["layers"][name].update(out_features=64), f"tensor {name}.weight is U8"),
        (lambda q: q["left_uncompressed"].update(gone="why"), "gone.weight is missing"),
        (lambda q: q.update(format_version=2), "format version 2"),
    ):
        edit_config(folder, lambda config, change=change: change(config["quantization_config"]))
        with pytest.raises(FormatError, match=message):
            inspect_folder(folder)
        (folder / "config.json").write_text(good)
    rewrite(folder, lambda tensors: tensors.pop(f"{name}.weight_scale"))
    with pytest.raises(FormatError, match=f"{name}.weight_scale is missing"):
        inspect_folder(folder)


def test_a_damaged_report_is_named(folder):
    for text in ("{", "[]"):
        (folder / "pbsp_report.json").write_text(text)
        with pytest.raises(FormatError, match="delete it to go on without"):
            inspect_folder(folder)


def test_truncated_and_missing_files_are_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"model\.safetensors cannot be read"):
            inspect_folder(folder)
    file.unlink()
    with pytest.raises(ModelError, match="no weights"):
        inspect_folder(folder)


def test_scales_in_another_type_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float16)}))
    with pytest.raises(FormatError, match=f"{name} is F16"):
        inspect_folder(folder)
