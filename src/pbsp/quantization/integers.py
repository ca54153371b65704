"""A matrix of small integers, Q = scale · (code − zero) with one pair per row and group of columns."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pbsp.binarization.planes import expand_scales
from pbsp.binarization.rotation import unrotate


@dataclass(frozen=True)
class IntegerGroups:
    """Asymmetric integers.

    Attributes:
        codes: 0 to 2^width − 1.
        scales: float32 of float16 values, positive.
        zeros: the code that stands for 0, 0 to 2^width − 1.
        width: bits of a code and of a zero point.
        block: columns that share a scale and a zero point; the last group of a row may be shorter.
        rotation: of the basis that they are in, see `binarization.rotation`; 1: none.

    Source: GPTQ (arXiv 2210.17323) as it is stored: at 128 columns 0.125 bits a weight for scales and
    width / 128 for zero points on top of the width.
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: UInt8[Tensor, "out groups"]
    width: int
    block: int
    rotation: int = 1

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that the integers stand for, in the basis of the layer's own inputs."""
        columns = self.codes.shape[1]
        scales = expand_scales(self.scales, self.block, columns)
        rotated = scales * (self.codes.float() - expand_scales(self.zeros.float(), self.block, columns))
        return unrotate(rotated, self.rotation)

    def split(self, rows: list[int]) -> list["IntegerGroups"]:
        """The integers of consecutive runs of rows; copies, so that the whole can be freed."""
        parts = (tensor.split(rows) for tensor in (self.codes, self.scales, self.zeros))
        return [
            replace(self, codes=codes.clone(), scales=scales.clone(), zeros=zeros.clone())
            for codes, scales, zeros in zip(*parts, strict=True)
        ]

    @staticmethod
    def join(parts: list["IntegerGroups"]) -> "IntegerGroups":
        """The rows of `parts`, of equal width and group size, one below the other."""
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zeros=torch.cat([part.zeros for part in parts]),
        )

    @property
    def nominal_bits(self) -> float:
        """Bits of a code alone, as papers count."""
        return float(self.width)
