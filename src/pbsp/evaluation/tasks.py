"""Zero-shot tasks: how often a model rates the right answer highest, as lm-evaluation-harness asks."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.errors import ConfigError, ModelError
from pbsp.evaluation.result import Estimate
from pbsp.evaluation.task_files import TASK_FILES, find_task_file, read_task_file

BATCH = 8
Source = Literal["official", "local files"]


@dataclass(frozen=True)
class TaskResult:
    """What a model scored on one task, or on a group of tasks, and on what.

    Attributes:
        task: lm-eval's name.
        metrics: by lm-eval's name, in its units. `acc` is the share of documents whose right answer has
            the largest log-likelihood, `acc_norm` the largest log-likelihood per character. A standard
            error is over documents, and None where the metric is not a mean of theirs.
        documents: that were scored, the first of `documents_in_all`.
        shots: solved examples before each question; None for a group whose tasks differ.
        source: "official", from the Hub, or "local files".
        version: of the task's definition.
        harness: version of lm-eval.
        digest: SHA-256 of the prompts and choices that were scored; None for a group.
        cut: requests whose prompt lost its beginning because the model has too few positions.
    """

    task: str
    metrics: dict[str, Estimate]
    documents: int
    documents_in_all: int
    shots: int | None
    source: Source
    version: str
    harness: str
    digest: str | None
    cut: int
    dtype: str
    device: str
    threads: int

    @property
    def acc(self) -> Estimate | None:
        """Accuracy by log-likelihood; None where the task does not define it."""
        return self.metrics.get("acc")

    @property
    def acc_norm(self) -> Estimate | None:
        """Accuracy by log-likelihood per character; None where the task does not define it."""
        return self.metrics.get("acc_norm")

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain JSON values; null where one is unknown or infinite."""
        values: dict[str, Any] = {"task": self.task}
        for name in dict.fromkeys(("acc", "acc_norm", *self.metrics)):
            estimate = self.metrics.get(name, Estimate(math.nan, None))
            values |= {name: _finite(estimate.mean), f"{name}_stderr": _finite(estimate.stderr)}
        for name in ("documents", "documents_in_all", "shots", "source", "version", "harness", "digest"):
            values[name] = getattr(self, name)
        return values | {"cut": self.cut, "dtype": self.dtype, "device": self.device, "threads": self.threads}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their documents, ready for any number of models; `definitions` are lm-eval's objects."""

    definitions: dict[str, Any]
    limit: int | None
    source: Source


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    files: Path | None = None,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TaskResult, ...]:
    """Score a model, compressed or not, on tasks; needs lm-eval, `pip install "pbsp[tasks]"`.

    Args:
        tasks: lm-eval's names of tasks, groups or tags; of tasks in `TASK_FILES` if there are `files`.
        limit: score the first so many documents of each task.
        files: folder of task files to take the documents from, instead of from the Hub.
        batch: requests per forward pass. The logits of one take tokens × vocabulary × 8 bytes.
        progress: told the requests answered and the requests in all.

    Raises:
        ConfigError: lm-eval is not installed, a name is unknown or a number out of range.
        CorpusError: documents cannot be loaded, or do not fit the task.
        ModelError: the model has no tokenizer, or its outputs are not finite.
    """
    loaded = load_tasks(tasks, limit=limit, files=files)
    return evaluate_loaded(model, tokenizer, loaded, batch=batch, progress=progress)


def load_tasks(names: Sequence[str], *, limit: int | None = None, files: Path | None = None) -> LoadedTasks:
    """Find everything that can be wrong with the request before there is a model; see `evaluate_tasks`."""
    names = list(dict.fromkeys(names))
    if not all(names) or not names:
        raise ConfigError("no task is named; name some, as in arc_easy,piqa")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; at least 1 document of each task is needed")
    harness = _harness()
    if files is not None:
        paths = {name: find_task_file(name, files) for name in names}
        rows = {name: read_task_file(name, path) for name, path in paths.items()}
        definitions = {name: TASK_FILES[name].definition for name in names}
        return LoadedTasks(harness.load_rows(rows, definitions), limit, "local files")
    known = set(names) <= set(TASK_FILES)
    folders = [TASK_FILES[name].definition for name in names] if known else None
    return LoadedTasks(harness.load_official(names, folders), limit, "official")


def evaluate_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    loaded: LoadedTasks,
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TaskResult, ...]:
    """Score a model on loaded tasks; see `evaluate_tasks`."""
    if batch < 1:
        raise ConfigError(f"a batch of {batch} requests; at least 1 is needed")
    if tokenizer is None or tokenizer.bos_token_id is tokenizer.eos_token_id is None:
        raise ModelError("the model has no tokenizer with a start or end token, so it cannot be asked")
    harness = _harness()
    scores = harness.score(
        model, tokenizer, loaded.definitions, limit=loaded.limit, batch=batch, progress=progress
    )
    found, results = scores.found, []
    for name, values in found["results"].items():
        leaves = scores.leaves[name]
        samples = [sample for leaf in leaves for sample in found["samples"][leaf]]
        metrics = dict(_metrics(values, samples))
        if not metrics:  # a group that only lists its tasks
            continue
        counts = [found["n-samples"][leaf] for leaf in leaves]
        results.append(
            TaskResult(
                task=name,
                metrics=metrics,
                documents=sum(count["effective"] for count in counts),
                documents_in_all=sum(count["original"] for count in counts),
                shots=found["n-shot"].get(name),
                source=loaded.source,
                version=str(found["versions"].get(name)),
                harness=harness.VERSION,
                digest=scores.digests.get(name),
                cut=sum(scores.cut.get(leaf, 0) for leaf in leaves),
                dtype=str(model.dtype).removeprefix("torch."),
                device=str(model.device),
                threads=torch.get_num_threads(),
            )
        )
    return tuple(results)


def _harness() -> ModuleType:
    """Our side of lm-eval, which is imported here because it is an extra, and takes seconds."""
    try:
        import pbsp.integrations.lm_eval as harness
    except ImportError as error:
        raise ConfigError(f'tasks need lm-evaluation-harness ({error}): pip install "pbsp[tasks]"') from None
    return harness


def _metrics(values: dict[str, Any], samples: list[dict[str, Any]]) -> Iterable[tuple[str, Estimate]]:
    """Name and value of each metric in lm-eval's results, whose keys are `metric,filter`.

    The standard error is taken from the documents' own values, where the metric is their mean.
    """
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        scored = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
        estimate = Estimate(float(value), None)
        if scored and all(isinstance(one, int | float) for one in scored):
            mean = Estimate.of([float(one) for one in scored])
            if math.isclose(mean.mean, value, rel_tol=1e-9, abs_tol=1e-12):
                estimate = mean
        yield (metric if filtered == "none" else f"{metric} ({filtered})"), estimate


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
