"""Evaluations as a table for people: every number beside what it was measured on."""

from collections.abc import Mapping

from rich.table import Table

from pbsp.evaluation.result import Estimate, Evaluation


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
    parts.append(f"token digest {evaluation.digest[:12]}")
    parts.append(f"{' and '.join(machines)}, {evaluation.threads} CPU threads")
    parts.append("nats per token; ± one standard error over windows")
    return "; ".join(parts)


def _estimate(estimate: Estimate | None, form: str) -> str:
    return "" if estimate is None else _with_error(estimate.mean, estimate.stderr, form)


def _with_error(value: float, stderr: float | None, form: str) -> str:
    if stderr is None:
        return f"{value:{form}}"
    error = f"{stderr:{form}}" if form.endswith("%") else f"{stderr:.2g}"
    return f"{value:{form}} ± {error}"
