import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import pbsp.commands.compress
import pbsp.commands.evaluate
import pbsp.commands.generate
from fresh import PBSP
from pbsp.cli import main
from tiny import CONFIGS, tiny_model, tiny_tokenizer

SAMPLES = ["--samples", "2", "--context", "16"]
SELF = ["--calibration", "self", *SAMPLES]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with `model`, and `out`, its compressed form, which no test changes."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    with pytest.raises(SystemExit):
        main(["compress", str(folder / "model"), "-o", str(folder / "out"), *SELF])
    return folder


@pytest.fixture
def source(work):
    return str(work / "model")


@pytest.fixture
def compressed(work):
    return work / "out"


@pytest.fixture
def text(work):
    return str(work / "text.txt")


def save_model(folder, model=None):
    (model or tiny_model()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command; stdout is parsed where --json is asked for."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    succeeded = ended.value.code == 0
    return ended.value.code, json.loads(output) if succeeded and "--json" in arguments else output, errors


def succeeds(capsys, *arguments):
    code, output, errors = run(capsys, *arguments)
    assert errors == ""
    assert code == 0
    return output


def fails(capsys, *arguments):
    """The one line on stderr of a command that must fail, and write nothing on stdout."""
    code, output, errors = run(capsys, *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("pbsp: ")
    assert errors.count("\n") == 1
    assert errors.endswith("\n")
    return errors


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def never_loads(*arguments, **settings):
    pytest.fail("the model was loaded although the request is wrong")


# compress


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
    assert "left uncompressed: model.layers.0.mlp.down_proj: pattern 3:8 does not tile" in output


def odd_model():
    """Rows of down_proj that hold no whole groups of 8."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 100
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


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


# evaluate, inspect, generate


def test_evaluate_gives_every_number_with_what_it_was_measured_on(capsys, source, compressed, text):
    found = succeeds(
        capsys, "evaluate", compressed, "--text", text, "--context", "32", "--windows", "3",
        "--against", source, "--json",
    )  # fmt: skip
    assert {"perplexity", "stderr", "tokens", "context", "text", "digest", "kl", "top1"} <= set(found)
    assert (found["tokens"], found["context"], found["text"]) == (3 * 31, 32, "text.txt")
    assert found["kl"] > 0
    assert 0 < found["top1"] <= 1
    assert not found["calibrated_on_this_text"]
    table = succeeds(capsys, "evaluate", compressed, "--text", text, "--context", "32", "--windows", "3")
    assert f"{found['perplexity']:.3f}" in table
    assert found["digest"][:12] in table


def test_evaluate_samples_from_the_original(capsys, source, compressed):
    numbers = ["--text", "self", "--windows", "2", "--context", "16", "--json"]
    found = succeeds(capsys, "evaluate", compressed, "--against", source, *numbers)
    assert found["text"] == "self"
    assert found["kl"] > 0
    assert not found["calibrated_on_this_text"]
    assert "--against" in fails(capsys, "evaluate", compressed, *numbers)
    assert succeeds(capsys, "evaluate", source, *numbers)["kl"] is None


def test_evaluate_says_when_the_model_was_calibrated_on_the_text(capsys, tmp_path, source, text):
    out = tmp_path / "out"
    succeeds(capsys, "compress", source, "-o", out, "--calibration", text, *SAMPLES)
    arguments = ("evaluate", out, "--text", text, "--context", "16", "--windows", "2")
    assert succeeds(capsys, *arguments, "--json")["calibrated_on_this_text"]
    assert "calibrated on this very text" in succeeds(capsys, *arguments)


@pytest.fixture
def task_files(tmp_path):
    rows = [
        {"goal": "cut", "sol1": "use a knife", "sol2": "sing", "label": 0},
        {"goal": "cook", "sol1": "sing", "sol2": "wait until it is done", "label": 1},
    ]
    (tmp_path / "piqa.valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_evaluate_scores_tasks_alone_if_no_text_is_named(capsys, source, compressed, task_files):
    tasks = ["--tasks", "piqa", "--task-files", task_files]
    found = succeeds(capsys, "evaluate", compressed, *tasks, "--json")
    assert set(found) == {"model", "against", "tasks", "original_tasks"}
    assert found["original_tasks"] is None
    (piqa,) = found["tasks"]
    assert (piqa["task"], piqa["documents"], piqa["shots"], piqa["source"]) == ("piqa", 2, 0, "local files")
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= set(piqa)
    table = succeeds(capsys, "evaluate", compressed, *tasks)
    assert f"{piqa['acc']:.2%} ± {piqa['acc_stderr']:.2%}" in table
    assert "acc_norm" in table
    assert "rows from local files" in table
    both = succeeds(capsys, "evaluate", compressed, *tasks, "--limit", "1", "--against", source, "--json")
    assert both["tasks"][0]["documents"] == both["original_tasks"][0]["documents"] == 1


def test_evaluate_measures_the_text_too_if_one_is_named(capsys, compressed, task_files, text):
    asked = ["--tasks", "piqa", "--task-files", task_files, "--text", text, "--context", "16"]
    found = succeeds(capsys, "evaluate", compressed, *asked, "--windows", "1", "--json")
    assert found["tokens"] == 15
    assert len(found["tasks"]) == 1
    output = succeeds(capsys, "evaluate", compressed, *asked, "--windows", "1")
    assert "perplexity" in output
    assert "acc_norm" in output


def test_inspect_prints_layers_and_bytes(capsys, compressed, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # parallel test runners set it for their workers
    output = succeeds(capsys, "inspect", compressed)
    assert "model.layers.1.mlp.down_proj" in output
    assert "plane codes" in output
    found = succeeds(capsys, "inspect", compressed, "--json")
    assert sum(found["bytes_by_kind"].values()) == found["file_bytes"]


def test_inspect_shows_names_in_full_on_a_narrow_screen(capsys, compressed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in succeeds(capsys, "inspect", compressed)


def test_generate_answers_in_text_or_json(capsys, compressed):
    answer = succeeds(capsys, "generate", compressed, "hello", "--max-tokens", "4")
    found = succeeds(capsys, "generate", compressed, "hello", "--max-tokens", "4", "--json")
    assert found["text"] == answer.removesuffix("\n")
    assert found["tokens"] <= 4


def test_no_arguments_show_the_help(capsys):
    assert "compress" in succeeds(capsys)


def test_module_runs_quietly_in_a_process_of_its_own(tmp_path, source, compressed, fresh):
    command = [sys.executable, "-m", "pbsp", "compress", source, "-o", str(tmp_path / "out"), *SELF]
    for done in (
        subprocess.run(command, capture_output=True, text=True, timeout=120),
        fresh(PBSP, "generate", compressed, "hello", "--max-tokens", "200"),
    ):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_module_reports_a_fault_in_one_line_and_code_2(tmp_path, fresh):
    done = fresh(PBSP, "compress", tmp_path / "none", "-o", tmp_path / "out", *SELF)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pbsp: ")
    assert done.stderr.count("\n") == 1


# faults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "9:8"], "keeps 9 of 8"),
        (["--pattern", "0:8"], "keeps 0 of 8"),
        (["--pattern", "abc"], "'abc' is not a pattern"),
        (["--pattern", "4:" + "9" * 5000], "is not a pattern"),
        (["--pattern", "1:8+1:8+1:8+1:8+1:8"], "5 planes"),
        (["--pattern", "3:10"], "multiple of 10"),
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
