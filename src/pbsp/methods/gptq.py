"""Method `gptq`: integers of few bits, column by column, the rival that binarization has to beat."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.rotation import check_rotation, rotate, rotate_moment, rotation_for
from pbsp.errors import ConfigError
from pbsp.methods.rounding import rounded_groups
from pbsp.quantization.integers import IntegerGroups
from pbsp.quantization.ranges import full_ranges, searched_ranges
from pbsp.solver.hessian import damped, inverse_factor


@dataclass(frozen=True)
class Gptq:
    """GPTQ without reordering of columns: each is rounded, those after it absorb its error.

    Attributes:
        bits: of a weight, 1 to 8.
        block: columns of a row that share a scale and a zero point.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        search: look for a range narrower than min/max, see `quantization.ranges`.
        rotation: as in `PlaneFit`; 1, none, as published. QuaRot (arXiv 2404.00456) rotates, then uses GPTQ.

    Raises:
        ConfigError: a field is out of range.

    Source: arXiv 2210.17323, Alg. 1, with its grouping and the asymmetric ranges of its released code.
    Unlike that code's, weights of inputs that were never active are rounded as all others, not zeroed.
    """

    rows_interact: ClassVar[bool] = False
    bits: int = 3
    block: int = 128
    damping: float = 0.01
    search: bool = True
    rotation: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits is {self.bits}; it must be between 1 and 8")
        if self.block < 1:
            raise ConfigError(f"block is {self.block}; at least 1 column must share a scale")
        if not 0 <= self.damping <= 10:
            raise ConfigError(f"damping is {self.damping}; it must be between 0 and 10 (0.01 is usual)")
        check_rotation(self.rotation)

    def compress(self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]) -> IntegerGroups:
        """Integers that lower tr(R S Rᵀ), R = W − Q, for the moment S of the layer's inputs.

        Raises:
            CalibrationError: the moment is not finite or, damped, not positive definite.
        """
        rotation = rotation_for(weight.shape[1], self.rotation)
        weight = rotate(weight, rotation)
        factor = inverse_factor(rotate_moment(damped(moment, self.damping), rotation)).to(weight.dtype)
        find = partial(searched_ranges if self.search else full_ranges, width=self.bits)
        codes, found = rounded_groups(weight, factor, find, block=self.block)
        return IntegerGroups(
            codes=codes.to(torch.uint8),
            scales=torch.stack([ranges.scales for ranges in found], 1).float(),
            zeros=torch.stack([ranges.zeros for ranges in found], 1).to(torch.uint8),
            width=self.bits,
            block=self.block,
            rotation=rotation,
        )
