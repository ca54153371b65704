"""One moment, the mean of x xᵀ over the tokens that come, and its sum over several processes."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.distributed import Ranks
from pbsp.models.blocks import linear_weight

_STRIP = 256  # rows of a moment that one product adds, from the diagonal on: the rest is their mirror image


class Moment:
    """A streaming mean of x xᵀ, summed in float32 as (in, in), in squared activation units.

    Little more than the upper half of the sum is computed, which saves a third of the time at 1,536 features.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | None = None

    def update(
        self, inputs: Float[Tensor, "*tokens in"], weights: Float[Tensor, "all"] | None = None
    ) -> None:
        """Add every token's outer product, times its weight.

        Args:
            weights: of all tokens of the layer, in the order in which they come; by default 1.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self._total is None:
            self._total = rows.new_zeros(rows.shape[1], rows.shape[1])
        weighted = rows
        if weights is not None:
            chosen = weights[self.tokens : self.tokens + len(rows)].to(rows.device)
            weighted = rows * chosen[:, None]
        for low in range(0, rows.shape[1], _STRIP):
            self._total[low : low + _STRIP, low:].addmm_(weighted[:, low : low + _STRIP].T, rows[:, low:])
        self.tokens += len(rows)

    def copy(self) -> "Moment":
        """One with the same sum, which what is added to this one does not change."""
        copied = Moment()
        copied.tokens, copied._total = self.tokens, None if self._total is None else self._total.clone()
        return copied

    def add_ranks(self, ranks: Ranks, *, tokens: int, zero: Callable[[], Float[Tensor, "in in"]]) -> None:
        """Make this the sum over all ranks, which call it together.

        Args:
            ranks: the processes that each have a part of the tokens.
            tokens: that all of them have.
            zero: makes the sum of a rank that has none.
        """
        self._total = ranks.add(zero() if self._total is None else self._total)
        self.tokens = tokens

    def mean(self) -> Float[Tensor, "in in"]:
        """Σ x xᵀ / tokens, symmetric. To be taken once, of what is complete."""
        assert self._total is not None
        total, self._total = self._total, None  # divided in place: of 11,008 features it is 0.5 GB
        for low in range(0, len(total), _STRIP):
            high = low + _STRIP
            total[high:, low:high] = total[low:high, high:].T
        return total.div_(self.tokens)


def moments_over_ranks(
    moments: dict[str, Moment], linears: dict[str, nn.Module], ranks: Ranks
) -> dict[str, Moment]:
    """The sums over all ranks, the same objects for the same linears on all of them.

    A linear may be called on some ranks only, as an expert is. Linears share a moment if every rank says so.
    """
    found = ranks.gather({name: (id(moment), moment.tokens) for name, moment in moments.items()})
    names = dict.fromkeys(name for one in found for name in one)
    sharing = {name: tuple(one.get(name, (None, 0))[0] for one in found) for name in names}
    sharers: dict[int, tuple[int | None, ...]] = {}
    for name, moment in moments.items():
        if sharers.setdefault(id(moment), sharing[name]) != sharing[name]:
            moments[name] = moment.copy()
    merged: dict[tuple[int | None, ...], Moment] = {}
    for name in names:
        if sharing[name] in merged:
            continue
        merged[sharing[name]] = moments.get(name, Moment())
        merged[sharing[name]].add_ranks(
            ranks,
            tokens=sum(one[name][1] for one in found if name in one),
            zero=partial(_no_sum, linears[name]),
        )
    return {name: merged[sharing[name]] for name in names}


def _no_sum(linear: nn.Module) -> Float[Tensor, "in in"]:
    weight = linear_weight(linear)
    return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
