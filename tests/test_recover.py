"""`pbsp recover`, through the command."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from pbsp.cli import main
from saved import load, logits
from tiny import tiny_model, tiny_tokenizer

SELF = ["--calibration", "self", "--samples", "20", "--context", "24"]


def wider():
    config = tiny_model().config
    config.intermediate_size = 160
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with `model`, its compressed form `out`, and `other`, of another size."""
    folder = tmp_path_factory.mktemp("recover")
    for name, model in (("model", tiny_model()), ("qwen2", tiny_model("qwen2")), ("other", wider())):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    with pytest.raises(SystemExit):
        main(["compress", str(folder / "model"), "-o", str(folder / "out"), "--pattern", "2:8", *SELF])
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    return ended.value.code, output, errors


def recovers(capsys, work, out, *arguments):
    options = ["--against", work / "model", "-o", out, *SELF, *arguments]
    return run(capsys, "recover", work / "out", *options)


def test_recover_writes_a_nearer_model_of_the_same_size_and_says_so(capsys, tmp_path, work, monkeypatch):
    monkeypatch.setattr("pbsp.recovery.model.TOKENS_A_STEP", 24)
    code, output, errors = recovers(
        capsys, work, tmp_path / "new", "--epochs", "8", "--rate", "0.01", "--json"
    )
    assert (code, errors) == (0, "")
    found = json.loads(output)["distilled"]
    assert found["after"] < 0.95 * found["before"]
    assert found["rate"] == 0.01
    assert (found["tokens"], found["held_out_tokens"]) == (19 * 24, 24)
    sizes = {
        name: (folder / "model.safetensors").stat().st_size
        for name, folder in (("before", work / "out"), ("after", tmp_path / "new"))
    }
    assert sizes["before"] == sizes["after"]
    report = json.loads((tmp_path / "new" / "pbsp_report.json").read_text())
    assert report["distilled"]["curve"] == found["curve"]
    before, after, original = (
        logits(load(path)) for path in (work / "out", tmp_path / "new", work / "model")
    )
    assert (after - original).norm() < (before - original).norm()
    provenance = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"][
        "provenance"
    ]
    assert provenance["recovered"]["tuning"]["epochs"] == 8
    assert provenance["config"]["pattern"] == "2:8"
    code, output, _ = run(
        capsys, "recover", tmp_path / "new", "--against", work / "model", "-o", tmp_path / "again", *SELF
    )
    assert code == 0
    assert "held-out tokens" in output


def test_a_stopped_tuning_goes_on_to_the_same_bytes(capsys, tmp_path, work, monkeypatch):
    monkeypatch.setattr("pbsp.recovery.model.TOKENS_A_STEP", 24)
    monkeypatch.setattr("pbsp.recovery.model.TOKENS_A_JUDGEMENT", 10 * 24)
    assert recovers(capsys, work, tmp_path / "whole")[0] == 0
    step = torch.optim.AdamW.step
    calls = []

    def stop(self, *arguments):
        calls.append(self)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("torch.optim.AdamW.step", stop)
        assert recovers(capsys, work, tmp_path / "new")[0] == 130
    assert (tmp_path / "new.unfinished" / "tuning.pt").is_file()
    code, _, errors = recovers(capsys, work, tmp_path / "new")
    assert code == 2
    assert "--resume" in errors
    code, _, errors = recovers(capsys, work, tmp_path / "new", "--resume", "--rate", "0.02")
    assert code == 2
    assert "rate is by divergence there and 0.02 here" in errors
    assert recovers(capsys, work, tmp_path / "new", "--resume")[0] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "new")]
    assert files[0] == files[1]
    assert not (tmp_path / "new.unfinished").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "other"], "name the model that it was made from"),
        (["--against", "qwen2"], "the original a qwen2"),
        (["--against", "out"], "already quantized"),
        (["--epochs", "0"], "at least 1"),
        (["--rate", "-1"], "rate is -1"),
        (["--code-rate", "nan"], "code_rate is nan"),
        (["--samples", "1"], "at least 2"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(
    capsys, tmp_path, work, arguments, message, monkeypatch
):
    monkeypatch.chdir(work)
    code, output, errors = recovers(capsys, work, tmp_path / "new", *arguments)
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_compressed_is_refused(capsys, tmp_path, work):
    code, _, errors = run(
        capsys, "recover", work / "model", "--against", work / "model", "-o", tmp_path / "x", *SELF
    )
    assert code == 2
    assert "not compressed by pbsp" in errors
