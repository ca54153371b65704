"""What `pbsp evaluate` does after parsing: perplexity on a text, accuracy on tasks, or both."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pbsp.calibration.corpus import SELF, Corpus, check_text, evaluation_windows
from pbsp.commands.console import bars, print_json, print_tables
from pbsp.errors import ConfigError
from pbsp.evaluation.perplexity import evaluate
from pbsp.evaluation.report import evaluation_table, tasks_table
from pbsp.evaluation.result import Evaluation
from pbsp.evaluation.tasks import LoadedTasks, TaskResult, evaluate_loaded, load_tasks
from pbsp.models.load import LoadedModel, load_model

DEFAULT_TEXT = "wikitext2"


def run_evaluate(
    source: str,
    *,
    text: str | None,
    windows: int,
    context: int,
    tasks: str | None,
    limit: int | None,
    task_files: str | None,
    against: str | None,
    seed: int,
    device: str,
    dtype: str,
    json: bool,
) -> None:
    """`pbsp evaluate`; a text is measured unless only tasks are asked for."""
    if text is None and tasks is None:
        text = DEFAULT_TEXT
    if text is not None:
        Corpus(text, windows or 1, context, seed)  # refuses numbers out of range
        check_text(text)
    wanted = _load_tasks(tasks, limit, task_files)
    loaded = load_model(source, device=device, dtype=dtype)
    original = load_model(against, device=device, dtype=dtype) if against else None
    values: dict[str, Any] = {"model": source, "against": against}
    tables = []
    if text is not None:
        result, seen = _measure_text(loaded, original, text, windows=windows, context=context, seed=seed)
        tables.append(evaluation_table({source: result}))
        values |= {**result.to_json(), "calibrated_on_this_text": seen}
    if wanted is not None:
        scores = _score_tasks(loaded, wanted, stage="tasks")
        original_scores = _score_tasks(original, wanted, stage="tasks, original") if original else ()
        rows = [(source, score) for score in scores] + [("original", score) for score in original_scores]
        tables.append(tasks_table(rows))
        values["tasks"] = [score.to_json() for score in scores]
        values["original_tasks"] = [score.to_json() for score in original_scores] if original else None
    if json:
        print_json(values)
        return
    print_tables(*tables)
    if values.get("calibrated_on_this_text"):
        print("Warning: the model was calibrated on this very text; the numbers flatter it.")


def _load_tasks(names: str | None, limit: int | None, files: str | None) -> LoadedTasks | None:
    if names is None:
        for option, value in (("--limit", limit), ("--task-files", files)):
            if value is not None:
                raise ConfigError(f"{option} is for --tasks; name some")
        return None
    folder = None if files is None else Path(files).expanduser()
    return load_tasks([name.strip() for name in names.split(",")], limit=limit, files=folder)


def _measure_text(
    loaded: LoadedModel, original: LoadedModel | None, text: str, *, windows: int, context: int, seed: int
) -> tuple[Evaluation, bool]:
    """What the model scores on the text, and whether it was calibrated on it."""
    if text == SELF and original is None and getattr(loaded.model, "is_quantized", False):
        raise ConfigError("text `self` is sampled from the original; name it with --against")
    with bars() as progress:
        chosen = evaluation_windows(
            text,
            loaded.tokenizer,
            original.model if original else loaded.model,
            context=context,
            windows=windows or None,
            seed=seed,
            progress=lambda done, total: progress("sample", done, total),
        )
        result = evaluate(
            loaded.model,
            chosen,
            original=original.model if original else None,
            progress=lambda done, total: progress("evaluate", done, total),
        )
    return result, chosen.were_calibrated_on(_calibration(loaded.model))


def _score_tasks(loaded: LoadedModel, wanted: LoadedTasks, *, stage: str) -> tuple[TaskResult, ...]:
    with bars() as progress:
        return evaluate_loaded(
            loaded.model,
            loaded.tokenizer,
            wanted,
            progress=lambda done, total: progress(stage, done, total),
        )


def _calibration(model: PreTrainedModel) -> dict[str, Any] | None:
    """What the model says it was calibrated on; None for an uncompressed one."""
    quantization = getattr(model.config, "quantization_config", None)
    return getattr(quantization, "provenance", {}).get("calibration")
