"""What a linear layer can be stored as, from half a bit up, and how each of these does against the others."""

from functools import cache

import torch

from pbsp.methods.planes import PlaneFit
from pbsp.pruning.pattern import Pattern, parse_patterns
from pbsp.storage.planes import PlanesForm

Planes = tuple[Pattern, ...]

_MENU = (
    *("1:8", "2:16", "1:4", "2:8", "4:16", "3:8", "5:8"),
    *("2:8+2:8", "3:8+2:8", "3:8+4:16", "3:8+3:8", "5:8+3:8"),
    *("3:8+3:8+1:8", "3:8+3:8+2:8", "3:8+3:8+4:16", "4:8+3:8+2:8", "4:8+4:8+2:8", "4:8+4:8+4:8"),
    *("4:8+4:8+4:8+2:8", "4:8+4:8+4:8+4:8"),
)
MENU: tuple[Planes, ...] = tuple(parse_patterns(text) for text in _MENU)
PROBES: tuple[Planes, Planes] = parse_patterns("2:8"), parse_patterns("3:8+3:8")
"""The two that a layer is tried with; of the others its errors are derived."""


def planes_bits(planes: Planes, out_features: int, in_features: int, block: int) -> int:
    """Bits of the stored tensors of a linear in layout `planes`, exactly."""
    form = PlanesForm(planes, in_features, out_features, block)
    return sum(spec.bits for spec in form.specs().values())


@cache
def reference_errors(block: int, sweeps: int) -> dict[Planes, float]:
    """Relative error of each entry on normal weights with white inputs: what a layer's errors follow.

    Between layers the errors differ, but of one layer they fall along the menu by nearly the same
    ratios; `errors_from_probes` fits the one power that is left.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    moment = torch.eye(256)
    signal = float(weight.square().sum())
    errors = {}
    for planes in MENU:
        found = PlaneFit(planes, block=block, sweeps=sweeps).compress(weight, moment).dense()
        errors[planes] = float((weight - found).square().sum()) / signal
    return errors


def errors_from_probes(first: float, second: float, block: int, sweeps: int) -> dict[Planes, float]:
    """A layer's relative error at every entry, given those at the two `PROBES`.

    The logarithm of the error is taken as linear in that of the reference error.
    """
    reference = reference_errors(block, sweeps)
    low, high = (torch.tensor(reference[probe]).log() for probe in PROBES)
    start, end = (torch.tensor(max(error, 1e-30)).log() for error in (first, second))
    power = (end - start) / (high - low)
    return {
        planes: float((start + power * (torch.tensor(error).log() - low)).exp())
        for planes, error in reference.items()
    }
