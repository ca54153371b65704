"""What an evaluation found, and on what: numbers that never travel without their text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ESTIMATES = ("loss", "loss_difference", "kl", "top1")
_ON_WHAT = ("original_perplexity", "tokens", "windows", "context", "text", "split", "digest")
_ON_WHICH_MACHINE = ("seed", "note", "dtype", "device", "threads")


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error; None of one window, which shows no spread."""

    mean: float
    stderr: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """The mean of one value per window; windows are taken as independent."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return Estimate(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return Estimate(mean, math.sqrt(variance / count))


@dataclass(frozen=True)
class Evaluation:
    """What a model scored, and on what.

    Losses and divergences are means over the scored tokens, in nats; standard errors are over windows.

    Attributes:
        perplexity, stderr: exp(loss) and its standard error to first order, perplexity × the loss's;
            the perplexity is infinite where a float cannot hold it.
        tokens: scored targets.
        text, split, windows, context, digest, seed, note: of the text; see `Windows`.
        original_perplexity: of the original on the same windows.
        loss_difference: the model's loss less the original's, paired per window.
        kl: KL(original ‖ model) over the whole vocabulary.
        top1: share of positions where both rank the same token first.
        window_losses: the mean loss of every window; not in the JSON.
    """

    loss: Estimate
    tokens: int
    windows: int
    context: int
    text: str
    split: str
    digest: str
    seed: int | None
    note: str
    dtype: str
    device: str
    threads: int
    original_perplexity: float | None = None
    loss_difference: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None
    window_losses: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity_of(self.loss.mean)

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity; None of one window."""
        return None if self.loss.stderr is None else self.perplexity * self.loss.stderr

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain JSON values; null where one is unknown or infinite."""
        values: dict[str, Any] = {"perplexity": self.perplexity, "stderr": self.stderr}
        for name in _ESTIMATES:
            estimate = getattr(self, name) or Estimate(math.nan, None)
            values |= {name: estimate.mean, f"{name}_stderr": estimate.stderr}
        values |= {name: getattr(self, name) for name in (*_ON_WHAT, *_ON_WHICH_MACHINE)}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `to_json`."""
        read = {name: values[name] for name in (*_ON_WHAT, *_ON_WHICH_MACHINE)}
        for name in _ESTIMATES:
            mean = values[name]
            read[name] = None if mean is None else Estimate(mean, values[f"{name}_stderr"])
        if read["original_perplexity"] is None and read["kl"] is not None:
            read["original_perplexity"] = math.inf
        return Evaluation(**read)


def perplexity_of(loss: float) -> float:
    """exp(loss); infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf  # above that, math.exp raises
