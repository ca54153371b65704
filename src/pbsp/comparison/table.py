"""A comparison as a table: for the terminal, as Markdown for papers, and as JSON."""

import json
from typing import Any

from rich.table import Table

from pbsp.comparison.folder import ComparisonFolder
from pbsp.comparison.result import Comparison, RowResult
from pbsp.evaluation.report import measured_on
from pbsp.evaluation.result import Evaluation


def comparison_table(found: Comparison) -> Table:
    """One line a row, the original first, and below it what all was measured on."""
    table = Table(caption="\n".join(caption(found)), caption_justify="left")
    for index, title in enumerate(_titles(found)):
        table.add_column(title, justify="right" if index else "left", overflow="fold")
    for cells in _lines(found):
        table.add_row(*cells)
    return table


def caption(found: Comparison) -> list[str]:
    """What the numbers were measured on, and what is special about some; one sentence or so a line."""
    calibration = found.calibration
    note = f" ({calibration['note']})" if calibration["note"] else ""
    lines = [
        f"calibrated on {calibration['text']} ({calibration['split']}): {calibration['windows']} windows of "
        f"{calibration['context']} tokens{note}, seed {calibration['seed']}"
    ]
    first = found.original.evaluations[0]
    lines += [
        f"evaluated on {measured_on(one)}; KL(original ‖ model) is on it" if one is first
        else f"evaluated on {measured_on(one)}"
        for one in found.original.evaluations
    ]  # fmt: skip
    lines.append("MB: of the weight files, written and measured; seconds: to calibrate and solve")
    if any(row.counted for row in found.finished):
        lines.append("*: no layout holds the result; its bits are counted, its bytes follow from them")
    lines += [f"{row.name}: failed: {row.error}" for row in found.failed]
    return lines


def markdown(found: Comparison) -> str:
    """The same table in Markdown."""
    titles = _titles(found)
    rule = ["---", *["---:"] * (len(titles) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, rule, *_lines(found))]
    return "\n".join([*lines, "", *(f"- {line}" for line in caption(found)), ""])


def to_json(found: Comparison) -> dict[str, Any]:
    """Everything in the table as plain JSON values; a row's layers stay in its own file."""
    return {
        "settings": found.settings,
        "calibration": found.calibration,
        "original": found.original.to_json(),
        "rows": [_row_json(row) for row in found.rows],
    }


def write_tables(folder: ComparisonFolder, found: Comparison) -> None:
    """table.json and table.md."""
    text = json.dumps(to_json(found), indent=1, allow_nan=False, ensure_ascii=False)
    folder.write("table.json", text + "\n")
    folder.write("table.md", markdown(found))


def _row_json(row: RowResult) -> dict[str, Any]:
    values = row.to_json()
    report = values.pop("report")
    if report is None:
        return values
    kept = {name: value for name, value in report.items() if name != "layers"}
    return {**values, **kept}


def _titles(found: Comparison) -> list[str]:
    titles = ["row", "nominal bits", "stored bits", "MB"]
    for index, evaluation in enumerate(found.original.evaluations):
        titles.append(f"perplexity, {evaluation.text}")
        titles += [] if index else ["KL"]
    return [*titles, "seconds"]


def _lines(found: Comparison) -> list[list[str]]:
    """The cells of every line."""
    original = found.original
    bits = str(original.bits)
    size = _megabytes(original.file_bytes)
    lines = [["original", bits, bits, size, *_scores(original.evaluations), ""]]
    lines += [
        [
            row.name,
            f"{row.nominal_bits:.3f}",
            f"{row.stored_bits:.3f}{'*' if row.counted else ''}",
            f"{_megabytes(row.file_bytes)}{'*' if row.counted else ''}",
            *_scores(row.evaluations),
            f"{row.seconds:.0f}",
        ]
        for row in found.finished
    ]
    blank = [""] * (len(_titles(found)) - 2)
    return [*lines, *([row.name, "failed", *blank] for row in found.failed)]


def _scores(evaluations: tuple[Evaluation, ...]) -> list[str]:
    cells = []
    for index, one in enumerate(evaluations):
        error = "" if one.stderr is None else f" ± {one.stderr:.2g}"
        cells.append(_perplexity(one.perplexity) + error)
        if not index:
            cells.append("" if one.kl is None else f"{one.kl.mean:.4f}")
    return cells


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e3 else f"{value:.4g}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 1e7 else f"{size / 1e6:.3f}"
