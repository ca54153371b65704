"""A comparison as two figures; matplotlib is optional, and nothing of it is global here."""

import importlib.util
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pbsp.comparison.folder import ComparisonFolder
from pbsp.comparison.result import Comparison, RowResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X<>ph"


def write_plots(folder: ComparisonFolder, found: Comparison) -> list[str]:
    """Write perplexity.png and, if some row's N differs between blocks, importance.png; returns their names.

    Without matplotlib, or a finished row, none is written.
    """
    if importlib.util.find_spec("matplotlib") is None or not found.finished:
        return []
    figures = {"perplexity.png": perplexity_figure(found)}
    if any(row.coarse for row in found.finished):
        figures["importance.png"] = importance_figure(found)
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        folder.write(name, image.getvalue())
    return list(figures)


_SIZES = {
    "stored bits per weight": lambda row: row.stored_bits,
    "weight files, MB": lambda row: row.file_bytes / 1e6,
}


def perplexity_figure(found: Comparison) -> "Figure":
    """Perplexity against stored bits and against the files' size; a series of markers for every method.

    One column of panels a text, one row a measure of size.
    """
    from matplotlib.ticker import LogFormatter

    texts = found.original.evaluations
    figure = _figure(5.5 * len(texts), 4.5 * len(_SIZES))
    methods = list(dict.fromkeys(row.method for row in found.finished))
    panels = figure.subplots(len(_SIZES), len(texts), squeeze=False)
    for (label, size), row_of_panels in zip(_SIZES.items(), panels, strict=True):
        for index, (axes, text) in enumerate(zip(row_of_panels, texts, strict=True)):
            axes.axhline(text.perplexity, color="black", linestyle="--", linewidth=1, label="original")
            for method, marker in zip(methods, _MARKERS * len(methods), strict=False):
                rows = [row for row in found.finished if row.method == method]
                _draw_series(axes, rows, index, size, marker=marker, label=method)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())
            axes.set_xlabel(label)
            axes.set_ylabel("perplexity")
            axes.set_title(f"{text.text}, {text.windows} windows of {text.context} tokens", fontsize=10)
            axes.grid(which="both", alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    return figure


def importance_figure(found: Comparison) -> "Figure":
    """The importance of every block as bars, and the N that it got as steps; a panel for every such row."""
    rows = [(row, row.coarse) for row in found.finished if row.coarse]
    figure = _figure(7.0, 2.8 * len(rows))
    for axes, (row, coarse) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        blocks = range(len(coarse["kept"]))
        axes.bar(blocks, coarse["importances"], color="tab:blue", alpha=0.5)
        axes.set_ylabel("importance", color="tab:blue")
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(row.name, fontsize=10)
        kept = axes.twinx()
        kept.step(blocks, coarse["kept"], where="mid", color="tab:red")
        kept.set_ylabel("N", color="tab:red")
        kept.set_ylim(min(coarse["kept"]) - 0.5, max(coarse["kept"]) + 0.5)
        kept.set_yticks(range(min(coarse["kept"]), max(coarse["kept"]) + 1))
    return figure


def _draw_series(
    axes: "Axes",
    rows: list[RowResult],
    text: int,
    size: Callable[[RowResult], float],
    *,
    marker: str,
    label: str,
) -> None:
    points = [
        (size(row), row.evaluations[text].perplexity, row.evaluations[text].stderr or 0.0)
        for row in rows
        if math.isfinite(row.evaluations[text].perplexity)
    ]
    if points:
        sizes, perplexities, errors = zip(*points, strict=True)
        axes.errorbar(sizes, perplexities, yerr=errors, fmt=marker, capsize=2, markersize=5, label=label)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
