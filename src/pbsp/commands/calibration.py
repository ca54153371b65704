"""The calibration text that a command's options choose, and how it is named."""

from typing import Any

from pbsp.calibration.corpus import SELF, Corpus
from pbsp.models.gguf import BUILTIN


def calibration_corpus(source: str, text: dict[str, Any]) -> Corpus:
    """The calibration text; what was not given depends on whether the model is the small built-in one."""
    small = source == BUILTIN
    defaults = {
        "calibration": SELF if small else "c4",
        "samples": 32 if small else 128,
        "context": 512 if small else 2048,
    }
    values = {**defaults, **text}
    return Corpus(values.pop("calibration"), **values)


def calibrated_on(calibration: dict[str, Any]) -> str:
    """A line that says what text was used."""
    extent = f"{calibration['windows']} windows of {calibration['context']} tokens"
    note = f" ({calibration['note']})" if calibration["note"] else ""
    return f"calibrated on {calibration['text']}: {extent}{note}, seed {calibration['seed']}"
