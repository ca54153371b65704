"""What a comparison has found: one result a row, and the original's, all measured on the same windows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pbsp.evaluation.result import Evaluation


@dataclass(frozen=True)
class RowResult:
    """What one row took and scored; of a failed one only its name, settings and error are there.

    Attributes:
        name: see `Row.name`.
        method: the first word of it.
        config: all settings.
        error: why it failed; None where it did not.
        file_bytes: of the weight files; counted, not written, where `counted`.
        counted: whether no layout holds the result.
        report: the compression's, as plain JSON values.
        evaluations: one a text.
    """

    name: str
    method: str
    config: dict[str, Any]
    error: str | None = None
    file_bytes: int = 0
    counted: bool = False
    report: dict[str, Any] | None = None
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def nominal_bits(self) -> float:
        """See `report.Bits`."""
        return self._reported("nominal_bits")

    @property
    def stored_bits(self) -> float:
        """See `report.Bits`."""
        return self._reported("stored_bits")

    @property
    def seconds(self) -> float:
        """Wall time of calibration and solving."""
        spent = self._reported("seconds")
        return spent["calibrate"] + spent["solve"]

    @property
    def coarse(self) -> dict[str, Any] | None:
        """The allocation over blocks, see `CoarseAllocation`."""
        return self._reported("coarse")

    def _reported(self, name: str) -> Any:
        assert self.report is not None, "a failed row has no report"
        return self.report[name]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "evaluations": [evaluation.to_json() for evaluation in self.evaluations]}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "RowResult":
        """The inverse of `to_json`."""
        evaluations = tuple(Evaluation.from_json(one) for one in values["evaluations"])
        return RowResult(**{**values, "evaluations": evaluations})


@dataclass(frozen=True)
class Original:
    """The uncompressed model.

    Attributes:
        bits: of a stored weight.
        file_bytes: of all its tensors, each stored once in so many bits.
        evaluations: one a text.
        rerun: whether it had to run again for every row, see `keep_predictions`.
    """

    source: str
    bits: int
    file_bytes: int
    evaluations: tuple[Evaluation, ...]
    rerun: bool

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = asdict(self)
        return {**values, "evaluations": [evaluation.to_json() for evaluation in self.evaluations]}


@dataclass(frozen=True)
class Comparison:
    """All rows that a folder holds.

    Attributes:
        settings: what was measured on what, by name; see `ComparisonFolder`.
        calibration: what the rows were calibrated on (`Windows.describe`).
        rows: sorted by stored bits, failed ones last.
    """

    settings: dict[str, str]
    calibration: dict[str, Any]
    original: Original
    rows: tuple[RowResult, ...]

    @property
    def finished(self) -> tuple[RowResult, ...]:
        """The rows that did not fail."""
        return tuple(row for row in self.rows if row.error is None)

    @property
    def failed(self) -> tuple[RowResult, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.error is not None)
