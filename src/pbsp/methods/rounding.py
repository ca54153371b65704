"""Rounding column by column in groups that share their values: the sweep of GPTQ, for any kind of group."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.solver.compensation import compensated_sweep


@runtime_checkable
class Values(Protocol):
    """The values that the weights of a row's group can take, by code."""

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest values."""
        ...

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for."""
        ...


V = TypeVar("V", bound=Values)


def rounded_groups(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    find: Callable[[Tensor], V],
    *,
    block: int,
) -> tuple[Float[Tensor, "out in"], list[V]]:
    """Codes of all weights, each column's error absorbed by those after it, and the values of every group.

    Args:
        factor: upper U with Uᵀ U = H⁻¹, in the weight's dtype.
        find: the values for a group's columns, called when the sweep reaches them, so that they fit the
            weights as earlier columns have moved them.
        block: columns of a group; the last may have fewer.

    Source: GPTQ (arXiv 2210.17323), Alg. 1, with the grouping of its released code.
    """
    codes = torch.empty_like(weight)
    found: list[V] = []

    def approximate(target: Tensor, columns: slice, _metric: Tensor) -> Tensor:
        values = find(target)
        found.append(values)
        group = codes[:, columns]

        def nearest(target: Tensor, column: slice, _metric: Tensor) -> Tensor:
            group[:, column] = values.codes(target)
            return values.values(group[:, column])

        # What the sweep of a group's own columns needs is its corner of the factor: inside it the
        # columns move each other, and the whole group's error then moves the columns after it.
        return compensated_sweep(target, factor[columns, columns], nearest, block=1)

    compensated_sweep(weight, factor, approximate, block=block)
    return codes, found
