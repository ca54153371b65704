"""Several processes, started by torchrun: what they make equals what one makes, and they end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fresh import TWO
from pbsp.cli import main
from pbsp.compress import check_ranks
from pbsp.config import Config
from pbsp.distributed import ALONE, Ranks, device_of_rank
from pbsp.errors import ConfigError, RankError
from pbsp.shared_unfinished import SharedUnfinished
from pbsp.torchrun import Place, check_command, place, watch_end
from pbsp.unfinished import Unfinished
from ranks_worker import CASES
from tiny import tiny_model, tiny_tokenizer

TESTS = Path(__file__).parent
TOLERANCES = {
    "paper": (0.2, 0.05),
    "budget": (0.01, 0.05),  # of ranges of integers, too
    "budget of experts": (0.01, 0.05),
    "experts": (0.01, 0.05),
    "one plain run": (0.005, 0.01),  # a scale that is rounded otherwise turns its whole row
}
"""Of numbers that differ, and of output errors: where near ties, or moments of a few tokens, decide."""


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)


def said(ended):
    """The lines that pbsp wrote on stderr; torchrun writes others."""
    return [line for line in ended.stderr.splitlines() if line.startswith("pbsp: ")]


def exit_codes(ended):
    """Of the processes, as torchrun reports them when it has failed, or they themselves."""
    return re.findall(r"exitcode +: (-?\d+)", ended.stderr)


def files(folder):
    """All that the result is, but for times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "pbsp_report.json"}


@pytest.fixture(scope="module")
def worked(tmp_path_factory, fresh):
    """The folder in which two processes have run `ranks_worker`, and what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = fresh(TWO, "from ranks_worker import main; main()", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_what_one_finds(case, worked):
    found = worked[1][case]
    assert found["processes"] == 2
    assert found["calibration"]
    assert found["patterns"]
    assert found["uncalibrated"]
    assert (found["starved"] > 0) == ("experts" in case)
    differing, error = TOLERANCES.get(case, (1e-3, 1e-4))
    assert found["differing"] <= differing * found["numbers"]
    assert found["error"] <= error


def test_masks_and_codes_are_the_same_on_a_plain_llama(worked):
    assert worked[1]["attention"]["differing"] == 0


def test_all_processes_end_with_the_same_numbers(worked):
    assert worked[1]["same everywhere"]


def test_query_rows_are_drawn_as_by_one_process(worked):
    assert worked[1]["attended"] < 1e-5


def test_attention_that_one_process_cannot_weight_is_weighted_by_none(worked):
    assert worked[1]["disagreeing"] == "it cannot"


def test_tensors_are_exchanged_and_tasks_spread(worked):
    assert worked[1]["exchanged"]
    assert worked[1]["spread"] == [0, 10, 20, 30]


def test_several_processes_resume_to_the_bytes_of_one(worked):
    folder, _ = worked
    assert files(folder / "resumed") == files(folder / "alone")


DYING = """
import os, signal, sys
import pbsp.block_run
from pbsp.cli import main

solve, calls = pbsp.block_run.solve_linears, []

def dying(*arguments, **named):
    calls.append(None)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return solve(*arguments, **named)

pbsp.block_run.solve_linears = dying
main(sys.argv[1:])
"""


def arguments_of(folder, out="out"):
    text = ["--calibration", str(folder / "text.txt"), "--samples", "5", "--context", "16"]
    return ["compress", str(folder / "model"), "-o", str(folder / out), "--pattern", "4:8", *text]


def save_model(folder, model, text):
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(text)


def test_a_killed_process_ends_all_and_any_number_of_them_goes_on(tmp_path, capsys, fresh):
    save_model(tmp_path, tiny_model(), "The quick brown fox jumps over the lazy dog. " * 20)
    ended = fresh(TWO, DYING, *arguments_of(tmp_path))
    assert "2" in exit_codes(ended)  # the other process's own; torchrun reports whichever it saw end first
    (line,) = said(ended)
    assert "go on with --resume" in line
    assert ended.stdout == ""
    kept = tmp_path / "out.unfinished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", kept.name, "text.txt"]
    assert Unfinished(kept).finished() == 1
    shutil.copytree(kept, tmp_path / "one.unfinished")

    ended = torchrun("-m", "pbsp", *arguments_of(tmp_path), "--resume", "--json")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["processes"] == 2
    assert said(ended) == []
    assert not kept.exists()
    for name, more in (("one", ["--resume"]), ("alone", [])):
        with pytest.raises(SystemExit) as exited:
            main([*arguments_of(tmp_path, name), *more])
        assert exited.value.code == 0, capsys.readouterr().err
    assert files(tmp_path / "out") == files(tmp_path / "alone")
    assert files(tmp_path / "one") == files(tmp_path / "alone")


def test_an_error_of_one_process_is_one_line_and_ends_all(tmp_path):
    """A byte's embedding is so large that its window, the second process's first, gives no numbers."""
    model = tiny_model("gpt2")
    model.transformer.wte.weight.data[tiny_tokenizer()("Z").input_ids[0]] = 3e38
    save_model(tmp_path, model, "The quick brown fox jumps over t" + "Z" * 16 + "he lazy dog. " * 2)
    ended = torchrun("-m", "pbsp", *arguments_of(tmp_path))
    assert said(ended) == [
        "pbsp: transformer.h.0: the model's own output there is NaN or infinite on the text"
    ]
    assert exit_codes(ended) == ["2", "2"]
    assert ended.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment that torchrun would give."""
    for name, value in {"RUN_ID": "x", "RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_only_what_torchrun_says_counts(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place() == Place()


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("command", ["compare", "evaluate", "generate"])
def test_other_commands_are_refused_in_a_line(command, capsys, monkeypatch):
    monkeypatch.setattr("pbsp.cli.speaks", lambda: True)
    with pytest.raises(SystemExit) as exited:
        main([command, "model"])
    assert exited.value.code == 2
    assert capsys.readouterr().err == (
        f"pbsp: pbsp {command} runs in one process: start it without torchrun\n"
    )
    check_command(["compress", "model"])


@pytest.mark.usefixtures("second_of_two")
def test_sigterm_is_an_error_that_clears_up():
    before = signal.getsignal(signal.SIGTERM)
    try:
        watch_end()
        with pytest.raises(RankError, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("second_of_two")
def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of_rank(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ConfigError, match="2 processes cannot share cuda:0"):
        device_of_rank("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_rank("auto") == "cpu"


def test_fewer_windows_than_processes_and_recovery_are_refused():
    check_ranks(Config(recover="block"), 1, ALONE)
    with pytest.raises(ConfigError, match="2 processes cannot share 1 calibration windows; start at most 1"):
        check_ranks(Config(), 1, Ranks(0, 2))
    with pytest.raises(ConfigError, match=r"recover block tunes .* start without torchrun"):
        check_ranks(Config(recover="block"), 8, Ranks(0, 2))


class Differing(Ranks):
    """Two processes that were started with other settings."""

    def gather(self, value):
        return [value, {**value, "version of torch": "9"}]


def test_processes_with_other_settings_are_refused_by_name():
    shared = SharedUnfinished(None, Differing(1, 2))
    with pytest.raises(RankError, match="version of torch is 8 in process 0 and 9 in process 1"):
        shared.claim({"pattern": "4:8", "version of torch": "8"})


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_follow_each_other_and_differ_by_one_at_most(size):
    for count in range(2 * size + 2):
        parts = [Ranks(rank, size).part(count) for rank in range(size)]
        assert [index for part in parts for index in part] == list(range(count))
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


def test_costly_tasks_are_dealt_first_and_evenly():
    owners = Ranks(0, 2).deal([3, 10, 4, 3])
    assert owners == [1, 0, 1, 1]
    assert ALONE.deal([3, 1]) == [0, 0]
