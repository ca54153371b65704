import json

import pytest

from command_line import SAMPLES, fails, succeeds


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
