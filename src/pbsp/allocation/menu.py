"""What a linear layer can be stored as, from half a bit up, and how each of these does against the others."""

from dataclasses import replace
from functools import cache

import torch

from pbsp.allocation.entry import Entry, parse_entry
from pbsp.methods.integers import IntegerFit
from pbsp.methods.planes import PlaneFit

_MENU = (
    *("1:8", "2:16", "1:4", "2:8", "4:16", "3:8", "5:8"),
    *("2:8+2:8", "3:8+2:8", "3:8+4:16", "3:8+3:8", "5:8+3:8"),
    *("3:8+3:8+1:8", "3:8+3:8+2:8", "3:8+3:8+4:16", "4:8+3:8+2:8", "4:8+4:8+2:8", "4:8+4:8+4:8"),
    *("e8-8", "e8-9", "e8-10", "e8-12"),
    *("e8-8+e8-8", "e8-10+e8-8", "e8-12+e8-8", "e8-12+e8-10", "e8-12+e8-12", "e8-12+e8-12+e8-8"),
    *("2 bit", "3 bit", "4 bit", "8 bit"),
)
MENU: tuple[Entry, ...] = tuple(parse_entry(text) for text in _MENU)
PROBES: tuple[Entry, Entry] = parse_entry("2:8"), parse_entry("3:8+3:8")
"""The two that a layer is tried with; of the others its errors are derived."""


def entry_fit(entry: Entry, planes: PlaneFit) -> PlaneFit | IntegerFit:
    """The method that stores a layer so: `planes` with these patterns, or integers fitted alike."""
    if isinstance(entry, int):
        return IntegerFit(entry, planes.block, planes.damping, planes.sweeps, planes.rotation)
    return replace(planes, patterns=entry)


@cache
def reference_errors(block: int, sweeps: int) -> dict[Entry, float]:
    """Relative error of each entry on normal weights with white inputs: what a layer's errors follow.

    Between layers the errors differ, but of one layer they fall along the menu by nearly the same
    ratios; `errors_from_probes` fits the one power that is left.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    moment = torch.eye(256)
    signal = float(weight.square().sum())
    errors = {}
    for entry in MENU:
        fit = entry_fit(entry, PlaneFit(block=block, sweeps=sweeps))
        found = fit.compress(weight, moment).dense()
        errors[entry] = float((weight - found).square().sum()) / signal
    return errors


def errors_from_probes(first: float, second: float, block: int, sweeps: int) -> dict[Entry, float]:
    """A layer's relative error at every entry, given those at the two `PROBES`.

    The logarithm of the error is taken as linear in that of the reference error.
    """
    reference = reference_errors(block, sweeps)
    low, high = (torch.tensor(reference[probe]).log() for probe in PROBES)
    start, end = (torch.tensor(max(error, 1e-30)).log() for error in (first, second))
    power = (end - start) / (high - low)
    return {
        entry: float((start + power * (torch.tensor(error).log() - low)).exp())
        for entry, error in reference.items()
    }
