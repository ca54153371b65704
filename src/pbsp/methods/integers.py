"""Method `integers`: few levels around zero, alike for all layers, what plans call "3 bit" or "8 bit"."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from pbsp.binarization.planes import SCALE_BLOCK, Planes, even_block, expand_scales, signs_of
from pbsp.binarization.refinement import descend_integers, refit_scales
from pbsp.binarization.rotation import check_rotation, rotate, rotate_moment, rotation_for
from pbsp.binarization.scales import round_scales
from pbsp.errors import ConfigError
from pbsp.methods.checks import check_blocks, check_sweeps
from pbsp.methods.rounding import rounded_groups
from pbsp.pruning.pattern import Pattern
from pbsp.quantization.rows import QuantizedRows, Steps, group_columns, join_rows
from pbsp.solver.hessian import damped, inverse_factor

PLANE_BITS = (2, 3, 4)
"""Of integers that are stored as so many dense planes with shared scales."""
DENSE = Pattern(1, 1)


@dataclass(frozen=True)
class IntegerFit:
    """Symmetric integers by GPTQ's sweep, those of few bits then by coordinate descent.

    2^bits levels, a whole number of steps from each other and none of them 0, are the sums of `bits` dense
    planes whose scales halve from plane to plane: that is how those of up to 4 bits are stored, with an 8-bit
    scale for every block of a row. Those of 8 bits are bytes with a float16 scale for every row.

    Attributes:
        bits: 2, 3, 4 or 8.
        block: as in `PlaneFit`; 8 bits have one scale for a row.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        sweeps: rounds of coordinate descent, each followed by a joint refit of a row's scales.
        rotation: as in `PlaneFit`.

    Raises:
        ConfigError: a field is out of range.

    Source: GPTQ (arXiv 2210.17323), see `rounded_groups`; its own ranges are those of method `gptq`.
    """

    rows_interact: ClassVar[bool] = False
    weighting: ClassVar[str] = "attention"
    bits: int = 4
    block: int = SCALE_BLOCK
    damping: float = 0.01
    sweeps: int = 3
    rotation: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (*PLANE_BITS, 8):
            raise ConfigError(f"bits is {self.bits}; integers have 2, 3, 4 or 8")
        check_blocks(self.block, self.damping)
        check_rotation(self.rotation)
        check_sweeps(self.sweeps)

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> Planes | QuantizedRows:
        """Integers that lower tr(R S Rᵀ), R = W − Q, for the moment S of the layer's inputs.

        Raises:
            CalibrationError: the moment is not finite or, damped, not positive definite.
        """
        rotation = rotation_for(weight.shape[1], self.rotation)
        weight = rotate(weight, rotation)
        hessian = rotate_moment(damped(moment, self.damping), rotation)
        factor = inverse_factor(hessian).to(weight.dtype)
        if self.bits not in PLANE_BITS:
            return QuantizedRows(rounded_rows(weight, factor, self.bits), self.bits, rotation)
        hessian = hessian.to(weight.dtype)
        block = even_block(weight.shape[1], self.block)
        codes, _ = rounded_groups(weight, factor, partial(Steps.of, bits=self.bits), block=block)
        largest = 2**self.bits - 1
        integers, steps = self._refit(weight, 2 * codes - largest, hessian, block)
        for _ in range(self.sweeps):
            integers = descend_integers(weight, integers, steps, hessian, largest=largest, scale_block=block)
            integers, steps = self._refit(weight, integers, hessian, block)
        halves = 2.0 ** torch.arange(self.bits - 1, -1, -1, device=weight.device)
        return Planes(
            patterns=(DENSE,) * self.bits,
            signs=integer_planes(integers, self.bits),
            scales=steps.float() * halves[:, None, None],
            scale_block=block,
            rotation=rotation,
            shared_scales=True,
        )

    def _refit(self, weight: Tensor, integers: Tensor, hessian: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The best steps, made non-negative by turning their integers, rounded to the stored format."""
        steps = refit_scales(weight, integers[None], hessian, block)
        turned = integers * expand_scales(signs_of(steps[0]), block, weight.shape[1])
        return turned, round_scales(steps.abs())[0].to(weight.dtype)


def integer_planes(integers: Float[Tensor, "out in"], bits: int) -> Int8[Tensor, "bits out in"]:
    """The ±1 whose sum, weighted by 2^(bits − 1), …, 2, 1, is each odd integer."""
    codes = ((integers + 2**bits - 1) / 2).to(torch.int32)
    shifts = range(bits - 1, -1, -1)
    return torch.stack([(2 * (codes >> shift & 1) - 1).to(torch.int8) for shift in shifts])


def rounded_rows(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], bits: int
) -> UInt8[Tensor, "out bytes"]:
    """The bytes of `quantization.rows`, each column's error absorbed by those after it.

    Args:
        factor: as in `rounded_groups`.
        bits: 8; or 4, where rows are whole groups.
    """
    block = group_columns(weight.shape[1], bits)
    codes, steps = rounded_groups(weight, factor, partial(Steps.of, bits=bits), block=block)
    return join_rows(codes, torch.stack([group.scales for group in steps], 1), bits)
