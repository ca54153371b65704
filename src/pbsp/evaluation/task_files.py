"""Rows of zero-shot tasks from a folder of JSON lines, for machines without the Hub.

The rows go through the official task of lm-evaluation-harness, its prompts and its metrics; they need the
keys that the official dataset has. A whole task is then scored as officially, if the rows are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbsp.calibration.texts import file_content, json_lines
from pbsp.errors import ConfigError, CorpusError

Row = dict[str, Any]
Answers = tuple[list[str], int]
"""The choices of a row, and which is right."""


@dataclass(frozen=True)
class TaskFile:
    """Where the rows of a task lie, and what they must have.

    Attributes:
        stem: of the file's name; `.jsonl` or `.jsonl.gz` follows.
        definition: the official task's folder among lm-eval's.
        keys: what the official prompts and labels read of a row.
        answers: a row's choices and the right one; raises one of ROW_ERRORS where a row has none.
    """

    stem: str
    definition: str
    keys: tuple[str, ...]
    answers: Callable[[Row], Answers]


ROW_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def _lettered(row: Row) -> Answers:
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


def _yes_or_no(row: Row) -> Answers:
    return ["no", "yes"], row["label"]


def _blank(row: Row) -> Answers:
    before = row["sentence"][: row["sentence"].index("_")]
    return [before + row["option1"], before + row["option2"]], ("1", "2").index(row["answer"])


TASK_FILES = {
    "arc_challenge": TaskFile("arc_challenge.test", "arc", ("question", "choices", "answerKey"), _lettered),
    "arc_easy": TaskFile("arc_easy.test", "arc", ("question", "choices", "answerKey"), _lettered),
    "boolq": TaskFile("boolq.dev", "super_glue/boolq", ("passage", "question", "label"), _yes_or_no),
    "hellaswag": TaskFile(
        "hellaswag.val",
        "hellaswag",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        lambda row: (row["endings"], int(row["label"])),
    ),
    "lambada_openai": TaskFile(
        "lambada_openai.test", "lambada", ("text",), lambda row: ([row["text"].split(" ")[-1]], 0)
    ),
    "openbookqa": TaskFile(
        "openbookqa.test",
        "openbookqa",
        ("question_stem", "choices", "answerKey"),
        lambda row: _lettered({**row, "answerKey": row["answerKey"].lstrip()}),  # as the official task does
    ),
    "piqa": TaskFile(
        "piqa.valid",
        "piqa",
        ("goal", "sol1", "sol2", "label"),
        lambda row: ([row["sol1"], row["sol2"]], row["label"]),
    ),
    "rte": TaskFile("rte.dev", "glue/rte", ("sentence1", "sentence2", "label"), _yes_or_no),
    "winogrande": TaskFile(
        "winogrande_xl.dev", "winogrande", ("sentence", "option1", "option2", "answer"), _blank
    ),
}


def find_task_file(task: str, folder: Path) -> Path:
    """The file of a task's rows in a folder.

    Raises:
        ConfigError: files of this task are not known.
        CorpusError: the folder or the file is not there.
    """
    if task not in TASK_FILES:
        raise ConfigError(f"task {task!r} cannot be read from files; those that can: {', '.join(TASK_FILES)}")
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder; name the one that holds the task files")
    names = [f"{TASK_FILES[task].stem}.jsonl{ending}" for ending in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CorpusError(f"{folder} holds neither {names[0]} nor {names[1]}, the file of task {task}")


def read_task_file(task: str, path: Path) -> list[Row]:
    """The rows of a task's file, cut down to the keys that the task reads.

    Raises:
        CorpusError: the file cannot be read, is empty, or has a line that lacks a key or the right answer.
    """
    keys = TASK_FILES[task].keys
    rows = []
    for number, row in json_lines(str(path), file_content(str(path))):
        missing = [key for key in keys if not isinstance(row, dict) or row.get(key) is None]
        if missing:
            raise CorpusError(
                f"{path}, line {number} lacks {', '.join(missing)}; task {task} reads {', '.join(keys)}"
            )
        if not _has_answer(task, row):
            raise CorpusError(
                f"{path}, line {number} has no right answer among whole choices for task {task}"
            )
        rows.append({key: row[key] for key in keys})
    if not rows:
        raise CorpusError(f"{path} has no rows")
    return rows


def _has_answer(task: str, row: Row) -> bool:
    try:
        choices, right = TASK_FILES[task].answers(row)
    except ROW_ERRORS:
        return False
    return all(isinstance(choice, str) and choice for choice in choices) and right in range(len(choices))
