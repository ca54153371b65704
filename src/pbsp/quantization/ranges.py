"""Where the integers of a group of weights lie: min/max of each row, or a narrower range that fits better."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# The released code of GPTQ searches these shrinks, by a norm between squared and cubed errors.
SHRINKS = tuple(1 - step / 100 for step in range(1, 80))
NORM = 2.4
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0  # what float16 can hold above 0


@dataclass(frozen=True)
class Ranges:
    """Per row, the 2^width values scale · (code − zero), zero among them.

    Attributes:
        scales: positive float16 values, held in the weight's dtype.
        zeros: the code of 0, a whole number of 0 to 2^width − 1, in the weight's dtype.
        width: bits of a code.
    """

    scales: Float[Tensor, "out"]
    zeros: Float[Tensor, "out"]
    width: int

    @staticmethod
    def spanning(low: Float[Tensor, "out"], high: Float[Tensor, "out"], width: int) -> "Ranges":
        """The values from about `low` ≤ 0 to about `high` ≥ 0; zeros are those of the stored scales."""
        top = 2**width - 1
        scales = ((high - low) / top).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().to(low.dtype)
        return Ranges(scales, (-low / scales).round().clamp(0, top), width)

    def codes(self, weight: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """The codes of the nearest values, in the weight's dtype; what lies outside goes to the ends."""
        codes = (weight / self.scales[:, None]).round_()
        return codes.add_(self.zeros[:, None]).clamp_(0, 2**self.width - 1)

    def values(self, codes: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """What the codes stand for; exact."""
        return (codes - self.zeros[:, None]).mul_(self.scales[:, None])

    def or_where(self, better: Bool[Tensor, "out"], other: "Ranges") -> "Ranges":
        """`other` in the rows where it is `better`, these in the rest."""
        scales = torch.where(better, other.scales, self.scales)
        return Ranges(scales, torch.where(better, other.zeros, self.zeros), self.width)


def full_ranges(weight: Float[Tensor, "out columns"], width: int) -> Ranges:
    """Each row from its least to its greatest weight, widened to include 0."""
    return Ranges.spanning(*_ends(weight), width)


def searched_ranges(weight: Float[Tensor, "out columns"], width: int) -> Ranges:
    """Each row's full range, or the shrink of both its ends that rounds the row with the least error.

    The error is Σ|w − q|^2.4, q under the stored float16 scale; of equally good ranges the widest is taken.

    Source: the "mse" option of GPTQ's released code (arXiv 2210.17323), whose paper uses min/max.
    """
    low, high = _ends(weight)
    best = Ranges.spanning(low, high, width)
    least = _rounding_errors(weight, best)
    # All rows at once, one shrink at a time: temporaries with the shrinks as an axis would leave the cache.
    for shrink in SHRINKS:
        ranges = Ranges.spanning(shrink * low, shrink * high, width)
        errors = _rounding_errors(weight, ranges)
        better = errors < least
        best, least = best.or_where(better, ranges), torch.where(better, errors, least)
    return best


def _ends(weight: Float[Tensor, "out columns"]) -> tuple[Float[Tensor, "out"], Float[Tensor, "out"]]:
    """The least weight of each row or 0, and the greatest or 0."""
    return weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)


def _rounding_errors(weight: Float[Tensor, "out columns"], ranges: Ranges) -> Float[Tensor, "out"]:
    """Σ|w − q|^2.4 of each row."""
    errors = ranges.values(ranges.codes(weight)).sub_(weight).abs_()
    return errors.log_().mul_(NORM).exp_().sum(1)  # as torch.pow, in a tenth of its time
