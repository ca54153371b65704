"""What `pbsp compare` does after parsing: check the request, load once, compare, print the table."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import TaskID

from pbsp.calibration.corpus import Corpus, check_text, evaluation_windows
from pbsp.calibration.windows import Windows
from pbsp.commands.calibration import calibration_corpus
from pbsp.commands.console import bars, new_bars, print_json, print_tables
from pbsp.comparison.folder import ComparisonFolder
from pbsp.comparison.plots import write_plots
from pbsp.comparison.result import Comparison, RowResult
from pbsp.comparison.rows import parse_rows
from pbsp.comparison.run import Step, compare
from pbsp.comparison.table import comparison_table, to_json
from pbsp.errors import PbspError
from pbsp.models.load import LoadedModel, load_model


@dataclass(frozen=True)
class EvaluationTexts:
    """What every row is evaluated on: the first `windows` of each text, 0 for all; `seed` is of `self`."""

    names: list[str]
    windows: int
    context: int
    seed: int

    def check(self) -> None:
        """Refuse what can be refused before the model is loaded."""
        for name in self.names:
            Corpus(name, self.windows or 1, self.context, self.seed)
            check_text(name)

    def windows_of(self, loaded: LoadedModel, progress: Callable[[int, int], None]) -> list[Windows]:
        """The windows of every text."""
        return [
            evaluation_windows(
                name,
                loaded.tokenizer,
                loaded.model,
                context=self.context,
                windows=self.windows or None,
                seed=self.seed,
                progress=progress,
            )
            for name in self.names
        ]


def run_compare(
    source: str,
    output: str,
    *,
    methods: str,
    patterns: str,
    calibration: dict[str, Any],
    texts: EvaluationTexts,
    device: str,
    keep_models: bool,
    json: bool,
) -> None:
    """`pbsp compare`; everything that can be wrong with the request is found before the model loads."""
    rows = parse_rows(methods, patterns)
    corpus = calibration_corpus(source, calibration)
    check_text(corpus.name)
    texts.check()
    folder = ComparisonFolder(Path(output))
    loaded = load_model(source, device=device)
    with bars() as progress:
        chosen = texts.windows_of(loaded, lambda done, total: progress("sample", done, total))
        calibrated = corpus.windows(
            loaded.tokenizer, loaded.model, progress=lambda done, total: progress("sample", done, total)
        )
    with _Progress() as shown:
        found = compare(
            loaded,
            rows,
            folder.path,
            calibration=calibrated,
            texts=chosen,
            keep_models=keep_models,
            progress=shown.step,
            finished=shown.finished,
        )
    plots = write_plots(folder, found)
    _print(found, folder, plots, json=json)
    failed = {row.name: row.error for row in found.failed}
    if all(row.name in failed for row in rows):
        raise PbspError(f"no row succeeded; {rows[0].name}: {failed[rows[0].name]}")


def _print(found: Comparison, folder: ComparisonFolder, plots: list[str], *, json: bool) -> None:
    if json:
        print_json(to_json(found))
        return
    print_tables(comparison_table(found))
    if found.original.rerun:
        print("the original ran again for every row: its logits are not its output embedding's alone")
    if found.finished and not plots:
        print("no plots: matplotlib is not installed; pip install 'pbsp[plots]' and run this again")
    print(f"written to {folder.path}: {', '.join(['table.json', 'table.md', *plots])}")


class _Progress:
    """Bars over rows and over the stage in work on a terminal; elsewhere a line on stderr for every row."""

    def __init__(self) -> None:
        self._bars = new_bars(memory_seconds=24.0 * 3600)
        self._tasks: list[TaskID] = []
        self._start = time.perf_counter()
        self._shown = ("", "")

    def __enter__(self) -> "_Progress":
        self._bars.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._bars.stop()

    def step(self, step: Step) -> None:
        """Move the bars."""
        if not self._tasks:
            self._tasks = [self._bars.add_task(f"{step.rows} rows", total=step.rows), self._bars.add_task("")]
        rows, stage = self._tasks
        if (step.row, step.stage) != self._shown:
            self._bars.reset(stage, description=f"{step.row}: {step.stage}", total=step.total)
        self._bars.update(stage, completed=step.done, total=step.total)
        self._bars.update(
            rows, completed=step.finished + step.share, description=f"row {step.finished + 1} of {step.rows}"
        )
        self._shown = (step.row, step.stage)

    def finished(self, result: RowResult, done: int, rows: int) -> None:
        """Say what a row gave, and how long the others may take."""
        if not self._bars.disable:
            return
        minutes = (time.perf_counter() - self._start) / done * (rows - done) / 60
        left = f"; about {minutes:.0f} min left" if done < rows else ""
        print(f"{done} of {rows}: {result.name}: {_outcome(result)}{left}", file=sys.stderr, flush=True)


def _outcome(result: RowResult) -> str:
    if result.error is not None:
        return f"failed: {result.error}"
    perplexity = ", ".join(f"{one.perplexity:.3f} on {one.text}" for one in result.evaluations)
    return f"{result.stored_bits:.3f} bits, perplexity {perplexity}"
