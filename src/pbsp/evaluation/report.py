"""Evaluations as tables for people: every number beside what it was measured on."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from pbsp.evaluation.result import Estimate, Evaluation
from pbsp.evaluation.tasks import TaskResult

_DIGEST_SHOWN = 12


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One row a model, the original's first where there is one; all on the same windows."""
    first = next(iter(evaluations.values()))
    table = Table(caption=measured_on(*evaluations.values()), caption_justify="left")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    against = first.kl is not None
    if against:
        for title in ("loss − original's", "KL(original ‖ model)", "same top token"):
            table.add_column(title, justify="right")
        table.add_row("original", f"{first.original_perplexity:.3f}", "", "", "")
    for name, evaluation in evaluations.items():
        cells = [name, _with_error(evaluation.perplexity, evaluation.stderr, ".3f")]
        if against:
            cells += [_estimate(evaluation.loss_difference, "+.4f"), _estimate(evaluation.kl, ".4f")]
            cells += [_estimate(evaluation.top1, ".1%")]
        table.add_row(*cells)
    return table


def measured_on(*evaluations: Evaluation) -> str:
    """Text, split, windows, tokens, seed, digest and machine of evaluations of the same windows."""
    evaluation = evaluations[0]
    machines = dict.fromkeys(f"{one.dtype} on {one.device}" for one in evaluations)
    parts = [
        f"{evaluation.text} ({evaluation.split})",
        f"{evaluation.windows} windows of {evaluation.context} tokens, {evaluation.tokens} scored",
    ]
    if evaluation.note:
        parts.append(evaluation.note)
    if evaluation.seed is not None:
        parts.append(f"seed {evaluation.seed}")
    parts.append(f"token digest {evaluation.digest[:_DIGEST_SHOWN]}")
    parts.append(f"{' and '.join(machines)}, {evaluation.threads} CPU threads")
    parts.append("nats per token; ± one standard error over windows")
    return "; ".join(parts)


def tasks_table(rows: Sequence[tuple[str, TaskResult]]) -> Table:
    """One row for each pair of a model's name and a result; the same tasks for all models."""
    results = [result for _, result in rows]
    table = Table(caption=_asked(results), caption_justify="left")
    several = len({model for model, _ in rows}) > 1
    for title in ("model", "task") if several else ("task",):
        table.add_column(title)
    metrics = list(dict.fromkeys(["acc", "acc_norm", *(name for one in results for name in one.metrics)]))
    for title in (*metrics, "documents", "shots"):
        table.add_column(title, justify="right")
    table.add_column("requests")
    for model, result in rows:
        cells = [_estimate(result.metrics.get(name), _form(name)) for name in metrics]
        whole = result.documents == result.documents_in_all
        cells.append(f"{result.documents}" if whole else f"{result.documents} of {result.documents_in_all}")
        cells.append("" if result.shots is None else str(result.shots))
        cells.append((result.digest or "")[:_DIGEST_SHOWN])
        table.add_row(*([model] if several else []), result.task, *cells)
    return table


def _asked(results: Sequence[TaskResult]) -> str:
    """What the numbers of tasks were measured on and mean."""
    first = results[0]
    data = "official data" if first.source == "official" else "rows from local files"
    machines = dict.fromkeys(f"{one.dtype} on {one.device}" for one in results)
    parts = [
        f"lm-eval {first.harness}'s prompts on {data}, no chat template",
        "acc: largest log-likelihood, acc_norm: per character",
        f"{' and '.join(machines)}, {first.threads} CPU threads",
        "± one standard error over documents",
        "requests: digest of prompts and choices",
    ]
    cut = {result.task: result.cut for result in results if result.cut}
    if cut:
        listed = ", ".join(f"{count} of {task}" for task, count in cut.items())
        parts.append(f"prompts that lost their beginning, the model having too few positions: {listed}")
    return "; ".join(parts)


def _form(metric: str) -> str:
    """Accuracies in percent; of other metrics the range is not known."""
    return ".2%" if metric.startswith("acc") else ".4g"


def _estimate(estimate: Estimate | None, form: str) -> str:
    return "" if estimate is None else _with_error(estimate.mean, estimate.stderr, form)


def _with_error(value: float, stderr: float | None, form: str) -> str:
    if stderr is None:
        return f"{value:{form}}"
    error = f"{stderr:{form}}" if form.endswith("%") else f"{stderr:.2g}"
    return f"{value:{form}} ± {error}"
