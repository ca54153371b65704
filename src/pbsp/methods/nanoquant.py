"""Method `nanoquant`: two sign factors of low rank, the rival at one stored bit and below."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.low_rank_fit import (
    Side,
    fit_sides,
    mean_scales,
    refit_column_scales,
    refit_row_scales,
)
from pbsp.binarization.planes import signs_of
from pbsp.errors import ConfigError
from pbsp.methods.checks import check_damping
from pbsp.solver.hessian import damped

_SCALE_BITS = 16
_BYTE = 8


@dataclass(frozen=True)
class Nanoquant:
    """NanoQuant's factorization of one layer: W ≈ diag(s₁) U Vᵀ diag(s₂), U and V of ±1.

    Attributes:
        bits: stored bits a weight, scales included; each layer gets the largest rank that they allow, in
            whole bytes of signs.
        iterations: rounds of alternating directions.
        ridge: of their least-squares steps, whose regressors have unit length.
        shrinkage: how far the mean squares of the inputs are drawn to their mean, 0 to 1; the paper has
            0.2 for Llama and Qwen.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        refits: rounds of least squares for s₁ and s₂ under the whole moment at the end; not the paper's.
        seed: of the first latents.

    Raises:
        ConfigError: a field is out of range.

    Source: arXiv 2602.06694; see `binarization.low_rank_fit`. Without its tuning
    of blocks and of the model. Outputs are not weighted, as there is no statistic of gradients here; the
    preconditioned weight is brought to a mean square of 1, as the paper leaves its scale open; the rank is
    rounded to a multiple of 8, not 32, nor kept from exceeding the shorter side, as the released code does.
    """

    rows_interact: ClassVar[bool] = True
    one_moment: ClassVar[bool] = True  # of all rows: V is theirs together
    bits: float = 1.0
    iterations: int = 400
    ridge: float = 0.03
    shrinkage: float = 0.2
    damping: float = 0.01
    refits: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 64:
            raise ConfigError(f"bits is {self.bits}; it must be above 0 and at most 64")
        if self.iterations < 1:
            raise ConfigError(f"iterations is {self.iterations}; at least 1 is needed")
        if not 0 < self.ridge <= 10:
            raise ConfigError(f"ridge is {self.ridge}; it must be above 0 and at most 10 (0.03 is usual)")
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage is {self.shrinkage}; it must be between 0 and 1")
        if self.refits < 0:
            raise ConfigError(f"refits is {self.refits}; it must be 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more and below 2^63")
        check_damping(self.damping)

    def rank(self, rows: int, columns: int) -> int:
        """The largest r, a multiple of 8, whose r · (rows + columns) signs and the scales are within `bits`.

        Raises:
            ConfigError: not even 8 fit.
        """
        largest = Fraction(self.bits) * rows * columns // (rows + columns) - _SCALE_BITS
        rank = int(largest) // _BYTE * _BYTE
        if rank < _BYTE:
            least = (_SCALE_BITS + _BYTE) * (rows + columns) / (rows * columns)
            raise ConfigError(
                f"bits is {self.bits}; rank 8 and the scales of {rows} x {columns} weights take {least:.3f}"
            )
        return rank

    def compress(self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]) -> LowRankBinary:
        """Factors that lower Σ_ij m_j (W − Q)_ij², m the shrunk diagonal of the moment of the layer's inputs.

        Raises:
            CalibrationError: the moment is not finite, or a least-squares step is singular.
            ConfigError: the layer is too small for `bits`.
        """
        rank = self.rank(*weight.shape)
        hessian = damped(moment, self.damping)
        squares = hessian.diagonal()
        squares = torch.lerp(squares, squares.mean(), self.shrinkage)
        lengths = squares.sqrt().to(weight.dtype)
        target = weight * lengths
        size = target.square().mean().sqrt()
        rows, columns = fit_sides(
            target / size.clamp(min=torch.finfo(weight.dtype).tiny),
            self._start(weight, rank),
            iterations=self.iterations,
            ridge=self.ridge,
        )
        row_scales, column_scales = mean_scales(rows.consensus, columns.consensus)
        row_signs, column_signs = signs_of(rows.consensus), signs_of(columns.consensus)
        row_scales, column_scales = size.double() * row_scales.double(), (column_scales / lengths).double()
        sums = (row_signs @ column_signs.T).double()
        for _ in range(self.refits):
            row_scales = refit_row_scales(weight.double(), sums, column_scales, hessian)
            column_scales = refit_column_scales(weight.double(), sums, row_scales, hessian)
        row_scales, column_scales = _balanced(row_scales, column_scales)
        return LowRankBinary(
            row_signs=row_signs.to(torch.int8),
            column_signs=column_signs.to(torch.int8),
            row_scales=row_scales.half().float(),
            column_scales=column_scales.half().float(),
        )

    def _start(self, weight: Tensor, rank: int) -> tuple[Side, Side]:
        """Sides from normal latents, drawn on the CPU so that every device has the same."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, columns = (torch.randn(count, rank, generator=generator) for count in weight.shape)
        return Side.start(rows.to(weight)), Side.start(columns.to(weight))


def _balanced(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The scales with equal norms and the same products (eq. 7); so that float16 holds both."""
    ratio = (columns.norm() / rows.norm().clamp(min=1e-300)).sqrt()
    if not ratio > 0:
        return torch.zeros_like(rows), torch.zeros_like(columns)
    return rows * ratio, columns / ratio
