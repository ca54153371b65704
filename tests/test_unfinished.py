import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pbsp
from fresh import PBSP
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.errors import ConfigError, OutputError
from pbsp.unfinished import FinishedBlock, Unfinished
from tiny import CONFIGS, tiny_model, tiny_tokens


def windows(seed=0):
    return Windows(tiny_tokens(4, 32, seed=seed), text="random", split="test", text_digest=str(seed))


class Stopped(Exception):  # noqa: N818
    """Stands for a crash."""


def run(folder, out=None, *, stop_before=None, corpus=None, **settings):
    """A compression kept in `folder`, ended early before a block."""

    def progress(stage, done, total):
        if stage == "compress" and done == stop_before:
            raise Stopped

    model = tiny_model("llama")
    report = pbsp.compress(
        model,
        None,
        Config(**settings),
        corpus=corpus or windows(),
        progress=progress,
        unfinished=None if folder is None else Unfinished(folder),
    )
    if out is not None:
        pbsp.save_compressed(model, None, out, report)
    return report


def files(folder):
    """All that the result is, but for times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "pbsp_report.json"}


@pytest.mark.parametrize(
    "settings", [{"pattern": "4:8"}, {"bits": 1.5}, {"method": "pbsp"}, {"inputs": "original"}]
)
def test_an_interrupted_run_ends_with_the_same_bytes(settings, tmp_path):
    whole = run(None, tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        run(tmp_path / "kept", stop_before=1, **settings)
    resumed = run(tmp_path / "kept", tmp_path / "resumed", **settings)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert resumed.layers == whole.layers


def test_finished_blocks_are_not_solved_again(tmp_path, monkeypatch):
    run(tmp_path / "kept", pattern="4:8")
    monkeypatch.setattr("pbsp.block_run.solve_linears", None)
    run(tmp_path / "kept", pattern="4:8")


@pytest.mark.parametrize("name", ["block-0001.safetensors", "hidden-0001.safetensors", "block-0001.json"])
def test_a_damaged_file_costs_its_block_alone(name, tmp_path):
    run(tmp_path / "kept", tmp_path / "whole", pattern="4:8")
    file = tmp_path / "kept" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    unfinished = Unfinished(tmp_path / "kept")
    assert unfinished.finished() == 1
    del unfinished
    run(tmp_path / "kept", tmp_path / "resumed", pattern="4:8")
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_other_settings_are_refused_by_name(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "kept", stop_before=1, pattern="4:8")
    with pytest.raises(ConfigError, match="pattern is 4:8 there and 2:8 here"):
        run(tmp_path / "kept", pattern="2:8")
    with pytest.raises(ConfigError, match="calibration digest is"):
        run(tmp_path / "kept", pattern="4:8", corpus=windows(seed=1))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first = Unfinished(tmp_path / "kept")
    with pytest.raises(OutputError, match="another process works in"):
        Unfinished(tmp_path / "kept")
    first.remove()
    assert not (tmp_path / "kept").exists()


def test_only_the_last_hidden_states_are_kept(tmp_path):
    unfinished = Unfinished(tmp_path / "kept")
    for index in range(4):
        unfinished.keep(index, FinishedBlock({"a": torch.ones(1)}, {}), [torch.full((1, 2), float(index))])
    assert [file.name for file in sorted(unfinished.folder.glob("hidden*"))] == [
        "hidden-0002.safetensors",
        "hidden-0003.safetensors",
    ]
    assert unfinished.finished() == 4
    assert next(unfinished.hidden(3)).tolist() == [[3.0, 3.0]]


def command(folder, *more):
    arguments = ["compress", str(folder / "model"), "-o", str(folder / "out"), "--pattern", "4:8"]
    arguments += ["--calibration", "self", "--samples", "2", "--context", "16", *more]
    return arguments


@pytest.mark.parametrize("delays", [(2,), pytest.param(range(20), marks=pytest.mark.slow)])
def test_killed_runs_resume_to_the_same_bytes(delays, tmp_path, fresh):
    """Killed at moments spread over the run; each is resumed, and compared with a run that nothing ended."""
    torch.manual_seed(0)
    deep = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 16})
    AutoModelForCausalLM.from_config(deep).save_pretrained(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert fresh(PBSP, *command(tmp_path)).returncode == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    killed = 0
    for step in delays:
        started = [sys.executable, "-m", "pbsp", *command(tmp_path)]
        process = subprocess.Popen(started, env=environment, stderr=subprocess.DEVNULL)
        kept = tmp_path / "out.unfinished"
        deadline = time.monotonic() + 120
        while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(step * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (
            tmp_path / "out"
        ).exists():  # it is whole, even if the process was killed before it could clear up
            shutil.rmtree(kept, ignore_errors=True)
        elif kept.exists():
            killed += 1
            assert fresh(PBSP, *command(tmp_path, "--resume")).returncode == 0
        assert files(tmp_path / "out") == files(tmp_path / "whole")
        assert not kept.exists()
        shutil.rmtree(tmp_path / "out")
    assert killed > 0
