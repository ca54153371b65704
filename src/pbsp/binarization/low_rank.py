"""A matrix of two sign factors of low rank and a scale per row and column, Q = diag(s₁) U Vᵀ diag(s₂)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from pbsp.errors import ConfigError


@dataclass(frozen=True)
class LowRankBinary:
    """Low-rank binary factors.

    Attributes:
        row_signs: U, ±1.
        column_signs: V, ±1.
        row_scales: s₁, float32 of float16 values.
        column_scales: s₂, as s₁.

    Source: NanoQuant (arXiv 2602.06694). Every row and every column takes rank + 16 bits.
    """

    row_signs: Int8[Tensor, "out rank"]
    column_signs: Int8[Tensor, "in rank"]
    row_scales: Float[Tensor, "out"]
    column_scales: Float[Tensor, "in"]

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 matrix; sums of signs are exact, so that it is the same in any order."""
        return self.row_scales[:, None] * self.sums() * self.column_scales

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """X Qᵀ in x's dtype, computed in float32 by one factor after the other; differentiable in x."""
        inner = (x.float() * self.column_scales) @ self.column_signs.float()
        return ((inner @ self.row_signs.float().T) * self.row_scales).to(x.dtype)

    def sums(self) -> Float[Tensor, "out in"]:
        """U Vᵀ in float32."""
        return self.row_signs.float() @ self.column_signs.float().T

    def split(self, rows: list[int]) -> list["LowRankBinary"]:
        """Consecutive runs of rows, each with the factor and scales of the columns; copies."""
        parts = zip(self.row_signs.split(rows), self.row_scales.split(rows), strict=True)
        return [
            LowRankBinary(
                signs.clone(), self.column_signs.clone(), scales.clone(), self.column_scales.clone()
            )
            for signs, scales in parts
        ]

    @staticmethod
    def join(parts: list["LowRankBinary"]) -> "LowRankBinary":
        """The rows of `parts` one below the other.

        Raises:
            ConfigError: they were not factorized together, so that no single V is theirs.
        """
        first = parts[0]
        for part in parts[1:]:
            if not (
                torch.equal(part.column_signs, first.column_signs)
                and torch.equal(part.column_scales, first.column_scales)
            ):
                raise ConfigError(
                    "rows of one linear layer have moments of their own, and a low-rank factorization is "
                    "of all rows together; use weighting plain"
                )
        return LowRankBinary(
            row_signs=torch.cat([part.row_signs for part in parts]),
            column_signs=first.column_signs,
            row_scales=torch.cat([part.row_scales for part in parts]),
            column_scales=first.column_scales,
        )

    @property
    def nominal_bits(self) -> float:
        """Signs per weight, without scales."""
        rows, columns = len(self.row_signs), len(self.column_signs)
        return self.row_signs.shape[1] * (rows + columns) / (rows * columns)
