import json

import pytest
from safetensors import safe_open

from command_line import SAMPLES, SELF, copy_of, fails, odd_model, save_model, succeeds


def test_compress_prints_one_json_object_whose_numbers_are_those_of_the_files(capsys, tmp_path, source):
    out = tmp_path / "out"
    found = succeeds(capsys, "compress", source, "-o", out, "--pattern", "4:8+2:8", *SELF, "--json")
    assert {"nominal_bits", "stored_bits", "file_bytes", "layers", "seconds", "peak_rss_bytes"} <= set(found)
    assert {"load", "calibrate", "solve", "save"} <= set(found["seconds"])
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert found["peak_rss_bytes"] > 10**7
    assert found["nominal_bits"] == pytest.approx(0.75)
    assert len(found["layers"]) == 14
    stored_bytes = {}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        for layer in found["layers"]:
            tensors = [
                file.get_tensor(f"{layer['name']}.{suffix}")
                for suffix in ("weight", "weight_scale", "weight_scale_offset")
            ]
            stored_bytes[layer["name"]] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            weights = layer["in_features"] * layer["out_features"]
            assert layer["stored_bits"] == pytest.approx(8 * stored_bytes[layer["name"]] / weights)
            assert layer["pattern"] == "4:8+2:8"
            assert 0 < layer["output_error"] < 0.2
    every_weight = sum(layer["in_features"] * layer["out_features"] for layer in found["layers"])
    assert found["stored_bits"] == pytest.approx(8 * sum(stored_bytes.values()) / every_weight)
    assert found["file_bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert sum(found["bytes_by_kind"].values()) == found["file_bytes"]
    assert found["source"] == source


def test_compress_prints_sizes_and_what_it_measured_on(capsys, tmp_path, source, text):
    output = succeeds(
        capsys, "compress", source, "-o", tmp_path / "out[1]", "--calibration", text, "--samples", "9999",
        "--context", "16", "--set", "block=64",
    )  # fmt: skip
    assert "stored bits per weight" in output
    assert "nominal bits per weight" in output
    assert "calibrated on text.txt: 112 windows of 16 tokens (112 of 9999 samples), seed 0" in output
    assert str(tmp_path / "out[1]") in output  # not taken for markup
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out[1]"]


def test_compress_lists_the_layers_that_it_leaves(capsys, tmp_path):
    source = save_model(tmp_path / "odd", odd_model())
    output = succeeds(capsys, "compress", source, "-o", tmp_path / "out", *SELF)
    assert "left uncompressed: model.layers.0.mlp.down_proj: e8-12 does not tile" in output


def test_config_file_gives_options_and_the_command_line_wins(capsys, tmp_path, source):
    config = tmp_path / "config.toml"
    config.write_text('pattern = "2:8"\ncalibration = "self"\nsamples = 3\nseed = 7\n[options]\nsweeps = 1\n')
    out = tmp_path / "out"
    found = succeeds(
        capsys, "compress", source, "-o", out, "--config", config, "--pattern", "4:8", *SAMPLES, "--json"
    )
    assert {layer["pattern"] for layer in found["layers"]} == {"4:8"}
    saved = json.loads((out / "config.json").read_text())["quantization_config"]["provenance"]
    assert saved["config"]["options"] == {"sweeps": 1}
    asked = {name: saved["calibration"][name] for name in ("text", "windows", "context", "seed")}
    assert asked == {"text": "self", "windows": 2, "context": 16, "seed": 7}


def test_a_strict_config_file_can_be_relaxed(capsys, tmp_path):
    source = save_model(tmp_path / "odd", odd_model())
    (tmp_path / "config.toml").write_text("strict = true\n")
    arguments = ("compress", source, "-o", tmp_path / "out", "--config", tmp_path / "config.toml", *SELF)
    assert "refused because of --strict" in fails(capsys, *arguments)
    succeeds(capsys, *arguments, "--no-strict")


def test_overwrite_replaces_the_model_in_the_folder(capsys, tmp_path, source, compressed):
    out = copy_of(compressed, tmp_path / "out")
    (out / "old").write_text("x")
    assert "pass --overwrite" in fails(capsys, "compress", source, "-o", out, *SELF)
    assert (out / "old").exists()
    succeeds(capsys, "compress", source, "-o", out, *SELF, "--overwrite")
    assert not (out / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_same_command_writes_the_same_weights(capsys, tmp_path, source, compressed):
    succeeds(capsys, "compress", source, "-o", tmp_path / "again", *SELF)
    first, again = (
        (folder / "model.safetensors").read_bytes() for folder in (compressed, tmp_path / "again")
    )
    assert first == again
