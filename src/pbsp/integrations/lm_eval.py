"""lm-evaluation-harness: its task definitions, on official or given rows, and its scoring of our models.

Importing this module needs lm-eval, which is an extra; nothing else of pbsp imports it but on demand.
"""

import contextlib
import difflib
import hashlib
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy
import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.errors import ConfigError, CorpusError
from pbsp.integrations.lm_eval_model import HarnessModel
from pbsp.models.quiet import no_bars, quiet_libraries

VERSION = lm_eval.__version__
_SPLIT = "file"
_DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"
_ROW_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, TemplateError)
_LOAD_ERRORS = (OSError, ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Scores:
    """What lm-eval found.

    Attributes:
        found: lm-eval's own results, with its samples.
        leaves: the tasks behind each name that has results: itself, or a group's tasks.
        digests: SHA-256 of each task's requests, prompts and choices, in order.
        cut: requests of each task whose prompt lost its beginning, to fit the model's positions.
    """

    found: dict[str, Any]
    leaves: dict[str, tuple[str, ...]]
    digests: dict[str, str]
    cut: Mapping[str, int]


def load_official(names: Sequence[str], definitions: Sequence[str] | None) -> dict[str, Any]:
    """The tasks of these names (tasks, groups or tags of lm-eval) with their data from the Hub or its cache.

    Args:
        names: what to load.
        definitions: folders of lm-eval's tasks that define them; None reads all its 15 000, which takes
            some 10 s.

    Raises:
        ConfigError: a name is unknown, or a task needs what the scoring of a text model cannot give.
        CorpusError: a task's data or code cannot be loaded.
    """
    with quiet_harness(), harness_seeds():
        manager = _manager(definitions)
        known = set(manager.all_tasks)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
                raise ConfigError(f"lm-eval {VERSION} has no task {name!r}; {hint}")
            _check_reachable(manager, name)
        loaded = cast(dict[str, Any], _load(manager, names, ", ".join(names)))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"task {name} runs generated code or needs more than text; run it with lm-eval")
        _set_shots(task)
    return loaded


def load_rows(rows: Mapping[str, list[dict[str, Any]]], definitions: Mapping[str, str]) -> dict[str, Any]:
    """Official tasks on given rows: nothing but the rows differs, and nothing is downloaded or cached.

    Args:
        rows: by task, with the keys of the official dataset.
        definitions: the folder of lm-eval's tasks that defines each.

    Raises:
        CorpusError: a row is not as the official task expects it.
    """
    tasks: dict[str, Any] = {}
    with quiet_harness(), harness_seeds():
        for name, task_rows in rows.items():
            manager = _manager([definitions[name]])
            changes = {"task": name, "custom_dataset": _in_memory(task_rows), "test_split": _SPLIT}
            changes |= {"training_split": None, "validation_split": None, "fewshot_split": None}
            try:
                task = manager.load({"group": "pbsp", "task": [changes]})["tasks"][name]
            except _ROW_ERRORS as error:
                raise CorpusError(
                    f"the rows of task {name} are not as lm-eval {VERSION} expects: {_one_line(error)}"
                ) from None
            _set_shots(task)
            tasks[name] = task
    return {"tasks": tasks}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, Any],
    *,
    limit: int | None,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> Scores:
    """Run the loaded tasks; the model's mode and the caller's random states are left as they were."""
    training = model.training
    try:
        with quiet_harness(), harness_seeds():
            harness = HarnessModel(model, tokenizer, batch=batch, progress=progress)
            # The bootstrap forks a pool of processes; without it lm-eval gives no standard errors at all.
            found = evaluate(harness, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    finally:
        model.train(training)
    leaves = {name: (name,) for name in loaded["tasks"]}
    for name, group in loaded.get("groups", {}).items():
        leaves[name] = tuple(task.task_name for task in group.get_all_tasks())
    digests = {name: _digest(task) for name, task in loaded["tasks"].items()}
    return Scores(cast(dict[str, Any], found), leaves, digests, harness.cut)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """No logs, bars or prints of lm-eval and datasets inside; their state is put back."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    data_level = datasets.logging.get_verbosity()
    logger.setLevel(logging.CRITICAL)
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    try:  # stdout is for results; some tasks' own code prints
        with quiet_libraries(), no_bars(*modules), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        datasets.logging.set_verbosity(data_level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def harness_seeds() -> Iterator[None]:
    """Inside, the seeds of lm-eval's own command; the caller's random states are put back."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


def _manager(definitions: Sequence[str] | None) -> TaskManager:
    if definitions is None:
        return TaskManager()
    folders: list[str | Path] = [_DEFINITIONS / folder for folder in dict.fromkeys(definitions)]
    return TaskManager(include_defaults=False, include_path=folders)


def _check_reachable(manager: TaskManager, name: str) -> None:
    """Ask for a small file of a task's data: offline that fails at once, where datasets retries for 24 s."""
    entry = manager.task_index[name]
    for member in sorted(entry.tags) if entry.cfg is None else [name]:
        path = (manager.task_index[member].cfg or {}).get("dataset_path")
        if isinstance(path, str) and path.count("/") == 1 and not Path(path).exists():
            try:
                snapshot_download(path, repo_type="dataset", allow_patterns=["README.md"])
            except OSError as error:
                raise CorpusError(_unreachable(member, error)) from None


def _load(manager: TaskManager, names: Sequence[str], described: str) -> Any:
    try:
        return manager.load(list(names))
    except OSError as error:
        raise CorpusError(_unreachable(described, error)) from None
    except _LOAD_ERRORS as error:
        raise CorpusError(f"lm-eval {VERSION} cannot load {described}: {_one_line(error)}") from None


def _unreachable(task: str, error: OSError) -> str:
    return (
        f"the data of task {task} cannot be loaded from the Hub ({_one_line(error)}); "
        "name a folder of task files with --task-files"
    )


def _in_memory(rows: list[dict[str, Any]]) -> Callable[..., dict[str, datasets.Dataset]]:
    """A dataset of one split, in the form that lm-eval takes one instead of a path."""
    return lambda **_: {_SPLIT: datasets.Dataset.from_list(rows)}


def _set_shots(task: Any) -> None:
    """As many examples before each question as the task's definition says; none if it says nothing."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _digest(task: Any) -> str:
    requests = [list(instance.args) for instance in task.instances]
    return hashlib.sha256(json.dumps(requests, default=str).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    """The first line of another library's error, and its type, without which a KeyError says little."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}"
