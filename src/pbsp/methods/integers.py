"""Method `integers`: 4 or 8 bits a weight in the layout of embeddings, for what must lose little."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.rotation import check_rotation, rotate, rotate_moment, rotation_for
from pbsp.errors import ConfigError, PatternError
from pbsp.methods.checks import check_damping
from pbsp.methods.rounding import rounded_groups
from pbsp.quantization.rows import GROUP, WIDTHS, QuantizedRows, Steps, group_columns, join_rows, width_for
from pbsp.solver.hessian import damped, inverse_factor


@dataclass(frozen=True)
class IntegerFit:
    """Symmetric integers, rounded column by column as GPTQ does, in `quantization.rows`' bytes.

    Attributes:
        bits: 4, stored in 4.5 bits a weight with a scale for 32 columns, or 8, with a scale a row.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        rotation: as in `PlaneFit`.

    Raises:
        ConfigError: a field is out of range.

    Source: GPTQ (arXiv 2210.17323), see `rounded_groups`; its own ranges are those of method `gptq`.
    """

    rows_interact: ClassVar[bool] = False
    weighting: ClassVar[str] = "attention"
    bits: int = 4
    damping: float = 0.01
    rotation: int = 64

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ConfigError(f"bits is {self.bits}; integers have 4 or 8 (planes have fewer)")
        check_damping(self.damping)
        check_rotation(self.rotation)

    def compress(self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]) -> QuantizedRows:
        """Integers that lower tr(R S Rᵀ), R = W − Q, for the moment S of the layer's inputs.

        Raises:
            PatternError: in 4 bit, a row is not made of whole groups.
            CalibrationError: the moment is not finite or, damped, not positive definite.
        """
        columns = weight.shape[1]
        if width_for(columns, self.bits) != self.bits:
            raise PatternError(f"rows of {columns} weights are not whole groups of {GROUP}, as 4 bits need")
        rotation = rotation_for(columns, self.rotation)
        weight = rotate(weight, rotation)
        factor = inverse_factor(rotate_moment(damped(moment, self.damping), rotation)).to(weight.dtype)
        find = partial(Steps.of, bits=self.bits)
        codes, steps = rounded_groups(weight, factor, find, block=group_columns(columns, self.bits))
        scales = torch.stack([group.scales for group in steps], 1)
        return QuantizedRows(join_rows(codes, scales, self.bits), self.bits, rotation)
