"""The choice for every part that costs least in sum and fits in a budget."""

from collections.abc import Sequence
from typing import NamedTuple

from pbsp.errors import ConfigError


class Choice(NamedTuple):
    """One way to store a part: its size in bits, and how much it is expected to raise the loss."""

    bits: int
    loss: float


def allocate(choices: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of the choice of every part; their bits in sum never exceed the budget.

    Each part starts at its smallest choice. Then the step with the greatest fall of loss per bit is taken,
    among the steps along each part's lower convex hull, as long as it fits; at the end what is left
    is filled with any choice that still lowers the loss, the best per bit first. Along the hulls this is
    the Lagrangian optimum, which no other choice of at most as many bits betters.

    Args:
        choices: of each part, in any order.
        budget: bits in all.

    Raises:
        ConfigError: even the smallest choices exceed the budget.
    """
    chosen = [min(range(len(part)), key=lambda index, part=part: part[index]) for part in choices]
    left = budget - sum(part[index].bits for part, index in zip(choices, chosen, strict=True))
    if left < 0:
        raise ConfigError(f"a budget of {budget} bits is {-left} bits below the smallest that can be stored")
    steps = [
        (-(part[low].loss - part[high].loss) / (part[high].bits - part[low].bits), number, low, high)
        for number, part in enumerate(choices)
        for low, high in _hull_steps(part, chosen[number])
    ]
    for _, number, low, high in sorted(steps):
        bits = choices[number][high].bits - choices[number][low].bits
        if chosen[number] == low and bits <= left:
            chosen[number] = high
            left -= bits
    return _filled(choices, chosen, left)


def _hull_steps(part: Sequence[Choice], start: int) -> list[tuple[int, int]]:
    """From the smallest choice, steps (from, to) along the lower convex hull, the steepest first."""
    steps = []
    at = start
    while True:
        better = [
            (-(part[at].loss - choice.loss) / (choice.bits - part[at].bits), choice.bits, index)
            for index, choice in enumerate(part)
            if choice.bits > part[at].bits and choice.loss < part[at].loss
        ]
        if not better:
            return steps
        nearest = min(better)[2]
        steps.append((at, nearest))
        at = nearest


def _filled(choices: Sequence[Sequence[Choice]], chosen: list[int], left: int) -> list[int]:
    """The choice with what is left spent where it lowers the loss most per bit, until nothing fits."""
    while True:
        options = []
        for number, part in enumerate(choices):
            now = part[chosen[number]]
            for index, choice in enumerate(part):
                bits = choice.bits - now.bits
                if choice.loss < now.loss and bits <= left:
                    options.append((-(now.loss - choice.loss) / max(bits, 1), number, index, bits))
        if not options:
            return chosen
        _, number, index, bits = min(options)
        chosen[number] = index
        left -= bits
