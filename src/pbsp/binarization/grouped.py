"""A matrix as the paper binarizes it: kept weights in magnitude groups, salient columns twice."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor

from pbsp.binarization.planes import expand_scales
from pbsp.pruning.pattern import Pattern

GROUPS = 3
SCALARS = 2 * GROUPS + 3
"""Of a row in a block: α and μ of each group, then both α of the salient weights and their one μ."""


@dataclass(frozen=True)
class GroupedBinarization:
    """Kept weights are α_g·B + μ_g, those in salient columns α₁·B + α₂·B₂ + μ; pruned ones are exactly 0.

    Attributes:
        pattern: N of every M consecutive weights of a row are kept.
        signs: B, +1 or −1 where a weight is kept, 0 where it is pruned.
        residual_signs: B₂, +1 or −1 where a weight is kept in a salient column, 0 elsewhere.
        groups: g, 0 to 2 where a weight is kept outside salient columns, 0 elsewhere.
        salient: columns with two terms, one row per part of the matrix's rows; parts are of equal size.
        scalars: float32 of float16 values; see `SCALARS`.
        block: columns that share their scalars; the last block of a row may be shorter.

    Source: arXiv 2502.01705; the two means of its residual binarization are one number and stored as one.
    """

    pattern: Pattern
    signs: Int8[Tensor, "out in"]
    residual_signs: Int8[Tensor, "out in"]
    groups: UInt8[Tensor, "out in"]
    salient: Bool[Tensor, "parts in"]
    scalars: Float[Tensor, "out blocks scalars"]
    block: int

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that the parts stand for."""

        def spread(scalar: int) -> Tensor:
            return expand_scales(self.scalars[:, :, scalar], self.block, self.signs.shape[1])

        result = torch.zeros(self.signs.shape, dtype=torch.float32, device=self.signs.device)
        for group in range(GROUPS):
            alpha, mean = spread(2 * group), spread(2 * group + 1)
            result = torch.where(self.groups == group, alpha * self.signs + mean, result)
        twice = spread(-3) * self.signs + spread(-2) * self.residual_signs + spread(-1)
        result = torch.where(self.residual_signs != 0, twice, result)
        return torch.where(self.signs != 0, result, 0.0)

    def split(self, rows: list[int]) -> list["GroupedBinarization"]:
        """Consecutive runs of rows; only of a matrix with one part."""
        assert len(self.salient) == 1, "a matrix of several parts is not split again"
        parts = (
            tensor.split(rows) for tensor in (self.signs, self.residual_signs, self.groups, self.scalars)
        )
        return [
            GroupedBinarization(
                self.pattern, signs.contiguous(), residual.contiguous(), groups.contiguous(), self.salient,
                scalars.contiguous(), self.block,
            )
            for signs, residual, groups, scalars in zip(*parts, strict=True)
        ]  # fmt: skip

    @staticmethod
    def join(parts: list["GroupedBinarization"]) -> "GroupedBinarization":
        """The rows of `parts` one below the other; each keeps its own salient columns."""
        if len(parts) == 1:
            return parts[0]
        # Stored parts are of equal size: a large one becomes several with the same columns.
        unit = math.gcd(*(len(part.signs) // len(part.salient) for part in parts))
        salient = [
            part.salient.repeat_interleave(len(part.signs) // len(part.salient) // unit, 0) for part in parts
        ]
        return GroupedBinarization(
            pattern=parts[0].pattern,
            signs=torch.cat([part.signs for part in parts]),
            residual_signs=torch.cat([part.residual_signs for part in parts]),
            groups=torch.cat([part.groups for part in parts]),
            salient=torch.cat(salient),
            scalars=torch.cat([part.scalars for part in parts]),
            block=parts[0].block,
        )
