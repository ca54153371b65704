import json
import os

import pytest
import torch

import pbsp.commands.compress
import pbsp.commands.evaluate
import pbsp.commands.generate
from command_line import SAMPLES, SELF, copy_of, fails, never_loads, odd_model, run, save_model
from tiny import tiny_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "9:8"], "keeps 9 of 8"),
        (["--pattern", "0:8"], "keeps 0 of 8"),
        (["--pattern", "abc"], "'abc' is not a pattern"),
        (["--pattern", "4:" + "9" * 5000], "is not a pattern"),
        (["--pattern", "1:8+1:8+1:8+1:8+1:8"], "5 planes"),
        (["--pattern", "3:6"], "multiple of 6"),
        (["--set", "block=100"], "block is 100"),
        (["--set", "sweeps=-1"], "sweeps is -1"),
        (["--set", "sweeps"], "write NAME=VALUE"),
        (["--method", "gptq"], "no packed layout here"),
        (["--set", "damping=nan"], "damping is nan"),
        (["--dtype", "float8"], "choose one of auto"),
        (["--inputs", "both"], "choose one of compressed"),
        (["--samples", "0"], "0 windows"),
        (["--context", "1"], "context of 1"),
        (["--seed", "-1"], "seed is -1"),
        (["--calibration", "missing.txt"], "there is no file missing.txt"),
        (["--calibration", "ptb"], "name a FILE"),
        (["--config", "missing.toml"], "takes a TOML file"),
        (["--samples", "many"], "--samples"),
        (["--frobnicate"], "No such option: --frobnicate"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_before_the_model_loads(
    capsys, tmp_path, source, monkeypatch, options, message
):
    monkeypatch.setattr(pbsp.commands.compress, "load_model", never_loads)
    assert message in fails(capsys, "compress", source, "-o", tmp_path / "out", *SELF, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('patern = "4:8"', "did you mean 'pattern'?"),
        ("colour = 1", "known options: method"),
        ("sample = 3", "did you mean 'samples'?"),
        ('samples = "3"', "samples must be of type int, not '3'"),
        ("options.sweeps = true", "sweeps must be of type int"),
        ("options.damping = 'x'", "damping must be of type float"),
        ("pattern", "cannot be read as TOML"),
    ],
)
def test_a_wrong_config_file_is_refused_before_the_model_loads(
    capsys, tmp_path, source, monkeypatch, line, message
):
    monkeypatch.setattr(pbsp.commands.compress, "load_model", never_loads)
    (tmp_path / "config.toml").write_text(line)
    options = ["--config", tmp_path / "config.toml"]
    assert message in fails(capsys, "compress", source, "-o", tmp_path / "out", *SELF, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"a\0b", "binary file"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_text_that_is_none_is_refused_before_the_model_loads(
    capsys, tmp_path, source, monkeypatch, content, message
):
    monkeypatch.setattr(pbsp.commands.compress, "load_model", never_loads)
    (tmp_path / "text.txt").write_bytes(content)
    text = str(tmp_path / "text.txt")
    arguments = ("compress", source, "-o", tmp_path / "out", "--calibration", text, *SAMPLES)
    assert message in fails(capsys, *arguments)
    assert message in fails(capsys, "evaluate", source, "--text", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--windows", "-1", "--text", "self"], "at least 1"),
        (["evaluate", "--context", "1", "--text", "self"], "context of 1"),
        (["evaluate", "--text", "missing.txt"], "no file missing.txt"),
        (["evaluate", "--tasks", "piqa", "--task-files", "missing"], "missing is not a folder"),
        (["evaluate", "--tasks", "mmlu", "--task-files", "missing"], "task 'mmlu' cannot be read from files"),
        (["evaluate", "--tasks", "piqa", "--limit", "0"], "limit is 0"),
        (["evaluate", "--tasks", ""], "no task is named"),
        (["evaluate", "--limit", "3"], "--limit is for --tasks"),
        (["evaluate", "--task-files", "."], "--task-files is for --tasks"),
        (["generate", "hello", "--max-tokens", "0"], "max_tokens is 0"),
        (["generate", "hello", "--temperature", "nan"], "temperature is nan"),
        (["generate", "hello", "--seed", "-1"], "seed is -1"),
    ],
)
def test_other_wrong_requests_are_refused_before_the_model_loads(
    capsys, source, monkeypatch, arguments, message
):
    for module in (pbsp.commands.evaluate, pbsp.commands.generate):
        monkeypatch.setattr(module, "load_model", never_loads)
    command, *rest = arguments
    assert message in fails(capsys, command, source, *rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress"], "Missing argument 'model'; see pbsp compress --help"),
        (["compress", "somewhere"], "Missing option '--output'"),
        (["generate", "somewhere"], "Missing argument 'prompt'"),
        (["inspect"], "Missing argument 'folder'"),
        (["squash"], "No such command 'squash'"),
    ],
)
def test_incomplete_commands_name_what_is_missing(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_unknown_models_are_named(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, message in (
        (tmp_path / "none", "does not exist"),
        ("no such model", "cannot be a Hub id"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "bare", "no weights"),
    ):
        line = fails(capsys, "compress", name, "-o", tmp_path / "out", *SELF)
        assert message in line
        assert str(name) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "empty"]


def test_a_text_shorter_than_a_window_is_refused(capsys, tmp_path, source):
    (tmp_path / "text.txt").write_text("short")
    options = ["--calibration", str(tmp_path / "text.txt"), *SAMPLES]
    line = fails(capsys, "compress", source, "-o", tmp_path / "out", *options)
    assert "text.txt has 5 tokens, fewer than one window of 16" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_a_pattern_that_no_layer_can_take_is_refused(capsys, tmp_path, source):
    options = ["--pattern", "1:7", "--set", "block=7"]
    line = fails(capsys, "compress", source, "-o", tmp_path / "out", *SELF, *options)
    assert "no layer can take 1:7" in line
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_nan_names_its_layer(capsys, tmp_path):
    model = tiny_model()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 4] = torch.nan
    source = save_model(tmp_path / "broken", model)
    assert "model.layers.1.mlp.up_proj" in fails(capsys, "compress", source, "-o", tmp_path / "out", *SELF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_strict_refuses_a_layer_that_does_not_tile(capsys, tmp_path):
    source = save_model(tmp_path / "odd", odd_model())
    line = fails(capsys, "compress", source, "-o", tmp_path / "out", *SELF, "--strict")
    assert "model.layers.0.mlp.down_proj" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_overwrite_removes_nothing_but_models(capsys, tmp_path, monkeypatch, source, compressed):
    monkeypatch.setattr(pbsp.commands.compress, "load_model", never_loads)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear").write_text("kept")
    copy_of(compressed, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path / "real")
    for source_name, output, message in (
        (source, tmp_path / "letters", "holds no model"),
        (source, tmp_path / "link", "symbolic link"),
        (source, tmp_path / "file", "is a file"),
        (source, tmp_path / "file" / "out", "is a file"),
        (source, ".", "current folder"),
        (source, source, "would remove the source"),
    ):
        assert message in fails(capsys, "compress", source_name, "-o", output, *SELF, "--overwrite")
    assert (tmp_path / "letters" / "dear").read_text() == "kept"
    assert os.path.exists(f"{source}/config.json")


def test_damaged_compressed_folders_are_refused_by_name(capsys, tmp_path, compressed, text):
    measured = ("--text", text, "--context", "16", "--windows", "2")
    flipped = copy_of(compressed, tmp_path / "flipped")
    flip_a_byte_of(flipped / "model.safetensors", "model.layers.0.mlp.up_proj.weight")
    line = fails(capsys, "evaluate", flipped, *measured)
    assert "model.layers.0.mlp.up_proj" in line
    assert "SHA-256" in line
    missing = copy_of(compressed, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    assert "no weights" in fails(capsys, "evaluate", missing, *measured)
    assert "no weights" in fails(capsys, "inspect", missing)
    truncated = copy_of(compressed, tmp_path / "truncated")
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for command in (["evaluate", truncated, *measured], ["inspect", truncated]):
        line = fails(capsys, *command)
        assert "model.safetensors" in line
        assert "damaged" in line


def flip_a_byte_of(file, key):
    data = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header_bytes])[key]["data_offsets"][0]
    data[8 + header_bytes + start] ^= 1
    file.write_bytes(data)


def test_inspect_refuses_an_uncompressed_folder(capsys, source, tmp_path):
    assert f"{source} is not compressed by pbsp" in fails(capsys, "inspect", source)
    assert "is not a folder" in fails(capsys, "inspect", tmp_path / "none")


def test_evaluate_refuses_a_context_longer_than_the_model(capsys, source, text):
    line = fails(capsys, "evaluate", source, "--text", text, "--context", "129")
    assert "129 tokens do not fit a model of 128 positions" in line


@pytest.mark.parametrize("stage", ["load_model", "compress", "save_compressed"])
def test_ctrl_c_leaves_nothing_and_exits_with_130(capsys, tmp_path, monkeypatch, source, stage):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(pbsp.commands.compress, stage, interrupt)
    code, output, errors = run(capsys, "compress", source, "-o", tmp_path / "out", *SELF)
    assert (code, output) == (130, "")
    assert errors == "pbsp: interrupted; no half-written output is left\n"
    finished = ["out.unfinished"] if stage == "save_compressed" else []
    assert [path.name for path in tmp_path.iterdir()] == finished


def test_ctrl_c_while_saving_keeps_the_old_model(capsys, tmp_path, monkeypatch, source, compressed):
    out = copy_of(compressed, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def interrupt(report):
        raise KeyboardInterrupt

    monkeypatch.setattr("pbsp.save._model_card", interrupt)
    arguments = ("compress", source, "-o", out, *SELF, "--pattern", "2:8", "--overwrite")
    assert run(capsys, *arguments)[0] == 130
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.unfinished"]
