"""A matrix as PBSP and its rivals binarize it: kept weights in magnitude groups, salient columns twice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor

from pbsp.binarization.planes import expand_scales
from pbsp.pruning.pattern import Pattern


class Level(NamedTuple):
    """One set of a row's weights in a block that share scalars, and where those stand.

    Attributes:
        salient: whether it is of salient columns, whose weights have two signs.
        group: which magnitude group of these columns.
        alpha, second, mean: positions of α (or α₁), α₂ and μ among the scalars; None where there is none.
    """

    salient: bool
    group: int
    alpha: int
    second: int | None
    mean: int | None

    @property
    def positions(self) -> list[int]:
        """Where all its scalars stand, in the order of an update: μ before the α."""
        return [position for position in (self.mean, self.alpha, self.second) if position is not None]


@dataclass(frozen=True)
class Scheme:
    """How many magnitude groups there are, and whether they have means. The default is the paper's.

    Attributes:
        groups: outside salient columns, each with α and μ.
        salient_groups: in salient columns, each with α₁, α₂ and one μ.
        means: False for α alone.
    """

    groups: int = 3
    salient_groups: int = 1
    means: bool = True

    @property
    def scalars(self) -> int:
        """Scalars of a row in a block."""
        return self.groups * (1 + self.means) + self.salient_groups * (2 + self.means)

    def levels(self) -> Iterator[Level]:
        """All levels; their scalars follow each other in this order, each level's μ last."""
        position = 0
        for salient, groups in ((False, self.groups), (True, self.salient_groups)):
            for group in range(groups):
                second = position + 1 if salient else None
                mean = position + 1 + salient if self.means else None
                yield Level(salient, group, position, second, mean)
                position += 1 + salient + self.means


PAPER = Scheme()


@dataclass(frozen=True)
class GroupedBinarization:
    """Kept weights are α_g·B + μ_g, those in salient columns α₁·B + α₂·B₂ + μ; pruned ones are exactly 0.

    Attributes:
        pattern: N of every M consecutive weights of a row are kept; None if no N:M was asked for.
        signs: B, +1 or −1 where a weight is kept, 0 where it is pruned.
        residual_signs: B₂, +1 or −1 where a weight is kept in a salient column, 0 elsewhere.
        groups: g of every kept weight, among those of its kind of column; 0 where it is pruned.
        salient: columns with two terms, one row per part of the matrix's rows; parts are of equal size.
        scalars: float32 of float16 values, in the order of `scheme.levels()`.
        block: columns that share their scalars; the last block of a row may be shorter.
        column_scales: factor of each scalar's terms in each column, per part, float32 of float16 values;
            None where all are 1. Only without means.

    Source: arXiv 2502.01705; the two means of its residual binarization are one number and stored as one.
    Column scales are those of ARB-RC (arXiv 2410.03129).
    """

    pattern: Pattern | None
    signs: Int8[Tensor, "out in"]
    residual_signs: Int8[Tensor, "out in"]
    groups: UInt8[Tensor, "out in"]
    salient: Bool[Tensor, "parts in"]
    scalars: Float[Tensor, "out blocks scalars"]
    block: int
    scheme: Scheme = PAPER
    column_scales: Float[Tensor, "parts scalars in"] | None = None

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that the parts stand for."""
        result = torch.zeros(self.signs.shape, dtype=torch.float32, device=self.signs.device)
        twice = self.residual_signs != 0
        for level in self.scheme.levels():
            value = self._spread(level.alpha) * self.signs
            if level.second is not None:
                value += self._spread(level.second) * self.residual_signs
            if level.mean is not None:
                value += self._spread(level.mean)
            result = torch.where((twice == level.salient) & (self.groups == level.group), value, result)
        return torch.where(self.signs != 0, result, 0.0)

    def _spread(self, scalar: int) -> Float[Tensor, "out in"]:
        """One scalar over the columns of its block, times the column's own factor."""
        spread = expand_scales(self.scalars[:, :, scalar], self.block, self.signs.shape[1])
        if self.column_scales is None:
            return spread
        factors = self.column_scales[:, scalar]
        return spread * factors.repeat_interleave(len(spread) // len(factors), 0)

    @property
    def nominal_bits(self) -> float:
        """Sign bits per weight: masks, groups and scalars are not counted, as in the papers."""
        signs = self.signs.count_nonzero() + self.residual_signs.count_nonzero()
        return int(signs) / self.signs.numel()

    def split(self, rows: list[int]) -> list["GroupedBinarization"]:
        """Consecutive runs of rows; only of a matrix with one part."""
        assert len(self.salient) == 1, "a matrix of several parts is not split again"
        parts = (
            tensor.split(rows) for tensor in (self.signs, self.residual_signs, self.groups, self.scalars)
        )
        return [
            replace(
                self,
                signs=signs.contiguous(),
                residual_signs=residual.contiguous(),
                groups=groups.contiguous(),
                scalars=scalars.contiguous(),
            )
            for signs, residual, groups, scalars in zip(*parts, strict=True)
        ]

    @staticmethod
    def join(parts: list["GroupedBinarization"]) -> "GroupedBinarization":
        """The rows of `parts` one below the other; each keeps its own salient columns."""
        if len(parts) == 1:
            return parts[0]
        # Stored parts are of equal size: a large one becomes several with the same columns.
        unit = math.gcd(*(len(part.signs) // len(part.salient) for part in parts))

        def parted(part: GroupedBinarization, tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(len(part.signs) // len(part.salient) // unit, 0)

        factors = [parted(part, part.column_scales) for part in parts if part.column_scales is not None]
        return replace(
            parts[0],
            signs=torch.cat([part.signs for part in parts]),
            residual_signs=torch.cat([part.residual_signs for part in parts]),
            groups=torch.cat([part.groups for part in parts]),
            salient=torch.cat([parted(part, part.salient) for part in parts]),
            scalars=torch.cat([part.scalars for part in parts]),
            column_scales=torch.cat(factors) if factors else None,
        )
