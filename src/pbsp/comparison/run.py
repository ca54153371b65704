"""Measuring several methods on one model: compressed, saved, evaluated and written down row by row."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from pbsp.calibration.windows import Windows
from pbsp.comparison.folder import ComparisonFolder
from pbsp.comparison.result import Comparison, Original, RowResult
from pbsp.comparison.rows import Row
from pbsp.comparison.settings import settings_of
from pbsp.comparison.table import write_tables
from pbsp.compress import compress
from pbsp.errors import ConfigError, PbspError
from pbsp.evaluation.kept import keep_predictions
from pbsp.evaluation.perplexity import Predictions, evaluate
from pbsp.evaluation.result import Evaluation
from pbsp.models.folder import weight_bytes
from pbsp.models.load import LoadedModel
from pbsp.models.precision import stored_tensors
from pbsp.planning import Measured
from pbsp.report import CompressionReport
from pbsp.save import save_compressed

_COMPRESSING = 0.5  # of a row's time, about


@dataclass(frozen=True)
class Step:
    """How far a comparison has come.

    Attributes:
        row: the row in work; "original" while that is evaluated.
        finished, rows: rows that this call has done, and has to do.
        stage: "compress", or "evaluate" and the text's name.
        done, total: steps of the stage.
        share: about the part of the row's time that has passed, 0 to 1; the original's passes count as none.
    """

    row: str
    finished: int
    rows: int
    stage: str
    done: int
    total: int
    share: float = 0.0


def compare(
    loaded: LoadedModel,
    rows: Sequence[Row],
    folder: Path,
    *,
    calibration: Windows,
    texts: Sequence[Windows],
    keep_models: bool = False,
    progress: Callable[[Step], None] | None = None,
    finished: Callable[[RowResult, int, int], None] | None = None,
) -> Comparison:
    """Compress the model as each row says, and evaluate every result against the model.

    A row's numbers are those of `compress`, `save_compressed` and `evaluate`. It is written when it is done;
    called again, `compare` does only the rows that are not there or have failed. The tables in the folder
    are written again after each.

    Args:
        loaded: the original; it is not changed.
        rows: from `parse_rows`.
        folder: new, or of a comparison of the same model on the same windows; see `ComparisonFolder`.
        calibration: what all rows are calibrated on.
        texts: what all rows are evaluated on.
        keep_models: keep the compressed models, where the method has a layout.
        progress: told of every step.
        finished: told of every row that is done, how many this call has done, and how many it has to do.

    Returns:
        All rows of the folder, also those of earlier calls.

    Raises:
        ConfigError: the folder holds a comparison on something else (names what differs).
        OutputError: the folder holds something else, or cannot be written.
        PbspError: the original cannot be evaluated. A row that cannot be done is a failed row instead.
    """
    _check_texts(texts)
    target = ComparisonFolder(folder)
    settings = settings_of(loaded, calibration, texts)
    target.claim(settings)
    done = {name for name, result in target.rows().items() if result.error is None}
    todo = [row for row in rows if row.name not in done]
    tell = _teller(progress, "original", 0, len(todo))
    original, measured = _measured_original(loaded, target, texts, tell)
    run = _Run(loaded, target, calibration, measured, keep_models)
    found = _comparison(target, settings, calibration, original)
    write_tables(target, found)
    for count, row in enumerate(todo):
        result = run.result(row, _teller(progress, row.name, count, len(todo)))
        target.add(row, result)
        found = _comparison(target, settings, calibration, original)
        write_tables(target, found)
        if finished:
            finished(result, count + 1, len(todo))
    return found


@dataclass(frozen=True)
class _Run:
    """What all rows share.

    Attributes:
        texts: with what the original predicted on each; the original itself where that was not kept.
        measured: of the original on the calibration text.
    """

    loaded: LoadedModel
    folder: ComparisonFolder
    calibration: Windows
    texts: list[tuple[Windows, Predictions | PreTrainedModel]]
    keep_models: bool
    measured: Measured = field(default_factory=Measured)

    def result(self, row: Row, tell: Callable[..., None]) -> RowResult:
        """The row's numbers, or why there are none."""
        config = row.config.for_source(self.loaded.source_dtype)
        empty = RowResult(row.name, config.method, config.to_dict())
        model = copy.deepcopy(self.loaded.model)
        try:
            report = compress(
                model,
                self.loaded.tokenizer,
                config,
                corpus=self.calibration,
                measured=self.measured,
                progress=lambda stage, done, total: tell(stage, done, total, _COMPRESSING * done / total),
            )
            report = replace(report, source=self.loaded.source, source_bytes=self.loaded.source_bytes)
            size = self._saved_bytes(model, report, row) if report.packed else _counted_bytes(model, report)
            _make_dense(model, self.loaded.model)
            evaluations = self._evaluations(model, tell)
        except PbspError as error:
            return replace(empty, error=str(error))
        return replace(
            empty,
            file_bytes=size,
            counted=not report.packed,
            report=report.to_dict(),
            evaluations=evaluations,
        )

    def _saved_bytes(self, model: PreTrainedModel, report: CompressionReport, row: Row) -> int:
        """Of the weight files that `save_compressed` writes."""
        if self.keep_models:
            folder = self.folder.model(row)
            save_compressed(model, self.loaded.tokenizer, folder, report, overwrite=True)
            return weight_bytes(folder)
        with tempfile.TemporaryDirectory(prefix=".saved-", dir=self.folder.path) as temporary:
            folder = Path(temporary) / "model"
            save_compressed(model, self.loaded.tokenizer, folder, report)
            return weight_bytes(folder)

    def _evaluations(self, model: PreTrainedModel, tell: Callable[..., None]) -> tuple[Evaluation, ...]:
        evaluations = []
        for index, (windows, original) in enumerate(self.texts):

            def progress(done: int, total: int, index: int = index, name: str = windows.text) -> None:
                part = (index + done / total) / len(self.texts)
                tell(f"evaluate {name}", done, total, _COMPRESSING + (1 - _COMPRESSING) * part)

            evaluations.append(evaluate(model, windows, original=original, progress=progress))
        return tuple(evaluations)


def _measured_original(
    loaded: LoadedModel, folder: ComparisonFolder, texts: Sequence[Windows], tell: Callable[..., None]
) -> tuple[Original, list[tuple[Windows, Predictions | PreTrainedModel]]]:
    """The original's numbers, and what to measure divergence from on every text."""
    evaluations, measured = [], []
    for windows in texts:
        evaluation, kept = keep_predictions(
            loaded.model,
            windows,
            folder.cache(windows.digest),
            progress=lambda done, total, name=windows.text: tell(f"evaluate {name}", done, total),
        )
        evaluations.append(evaluation)
        measured.append((windows, kept or loaded.model))
    bits = 16 if loaded.source_dtype is not None else 8 * loaded.model.dtype.itemsize
    weights = sum(tensor.numel() for _, tensor in stored_tensors(loaded.model))
    rerun = any(original is loaded.model for _, original in measured)
    return Original(loaded.source, bits, bits * weights // 8, tuple(evaluations), rerun), measured


def _comparison(
    folder: ComparisonFolder, settings: dict[str, str], calibration: Windows, original: Original
) -> Comparison:
    rows = folder.rows().values()
    finished = sorted((row for row in rows if row.error is None), key=lambda row: row.stored_bits)
    failed = [row for row in rows if row.error is not None]
    return Comparison(settings, calibration.describe(), original, (*finished, *failed))


def _teller(
    progress: Callable[[Step], None] | None, row: str, finished: int, rows: int
) -> Callable[..., None]:
    """Tells `progress`, if there is one, of a step of this row."""
    if progress is None:
        return lambda *step: None
    return lambda *step: progress(Step(row, finished, rows, *step))


def _make_dense(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Decode packed layers, in the type that the original computes in: the numbers are the same, sooner."""
    if getattr(model, "is_quantized", False):
        model.dequantize(original.dtype)
    elif model.dtype != original.dtype:  # else leave alone what transformers keeps in float32
        model.to(original.dtype)  # pyright: ignore[reportArgumentType] - its overloads hide this one


def _counted_bytes(model: PreTrainedModel, report: CompressionReport) -> int:
    """What the weights would take in a file if there were a layout: their counted bits, all else as it is."""
    compressed = {id(model.get_submodule(layer.name).weight) for layer in report.layers}
    rest = sum(
        tensor.numel() * tensor.element_size()
        for _, tensor in stored_tensors(model)
        if id(tensor) not in compressed
    )
    return rest + round(sum(layer.stored_bits * layer.weights for layer in report.layers) / 8)


def _check_texts(texts: Sequence[Windows]) -> None:
    """Raise ConfigError unless there are texts, all different."""
    if not texts:
        raise ConfigError("no text is given to evaluate on; name one with --text")
    names: dict[str, str] = {}
    for text in texts:
        if text.digest in names:
            raise ConfigError(f"texts {names[text.digest]} and {text.text} have the same windows; name one")
        names[text.digest] = text.text
