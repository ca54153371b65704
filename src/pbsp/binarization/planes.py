"""A matrix as a sum of N:M binary planes: Q = Σ_p a_p ⊙ K_p ⊙ B_p, the representation of layout `planes`."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from pbsp.binarization.rotation import unrotate
from pbsp.binarization.scales import round_scales
from pbsp.pruning.pattern import PlanePattern

SCALE_BLOCK = 640
"""Most columns that share a scale, unless a method is told otherwise.

Rotated weights are of like magnitude: narrower blocks cost more bits than they win (docs/experiments.md).
"""


@dataclass(frozen=True)
class Planes:
    """One to four binary planes of a weight matrix.

    Attributes:
        patterns: of each plane.
        signs: +1 or −1 where a plane keeps a weight, 0 where it prunes it; exactly N of every M are kept. Of
            a lattice, its doubled vectors.
        scales: float32, non-negative, one per plane, row and block of columns; in units of the weight.
            A finished solve holds only values that the stored 8-bit format can express (see `scales.py`).
        scale_block: columns that share a scale; the last block of a row may be shorter.
        rotation: size of the Hadamard matrices of the basis that the planes are in, see `rotation`; 1: none.
        shared_scales: each plane's scales are half of those of the plane before, so that dense planes are
            the bits of odd integers; they are stored once.

    Source: method.md §9 of this project; one plane is the paper's (arXiv 2502.01705) α·B⊙K with μ = 0.
    """

    patterns: tuple[PlanePattern, ...]
    signs: Int8[Tensor, "planes out in"]
    scales: Float[Tensor, "planes out blocks"]
    scale_block: int
    rotation: int = 1
    shared_scales: bool = False

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that the planes stand for, in the basis of the layer's own inputs."""
        return unrotate(self.rotated(), self.rotation)

    def rotated(self) -> Float[Tensor, "out in"]:
        """The same in the planes' basis: their sum, in their order."""
        total = torch.zeros(self.signs.shape[1:], dtype=torch.float32, device=self.signs.device)
        for signs, scales in zip(self.signs, self.scales, strict=True):
            total += signs * expand_scales(scales, self.scale_block, signs.shape[1])
        return total

    def split(self, rows: list[int]) -> list["Planes"]:
        """The planes of consecutive runs of rows; copies, so that the whole can be freed."""
        return [
            replace(self, signs=signs.contiguous(), scales=scales.contiguous())
            for signs, scales in zip(self.signs.split(rows, 1), self.scales.split(rows, 1), strict=True)
        ]

    @staticmethod
    def join(parts: list["Planes"]) -> "Planes":
        """The rows of `parts` one below the other; the smallest scales are rounded to the common offset."""
        if len(parts) == 1:
            return parts[0]
        scales = round_scales(torch.cat([part.scales for part in parts], 1))
        signs = torch.cat([part.signs for part in parts], 1)
        return replace(parts[0], signs=signs, scales=scales)

    @property
    def nominal_bits(self) -> float:
        """Kept weights per weight, over all planes: sign bits, as the paper counts."""
        return sum(pattern.nominal_bits for pattern in self.patterns)

    @property
    def keep(self) -> Bool[Tensor, "planes out in"]:
        """True where a plane keeps a weight."""
        return self.signs != 0


def block_count(in_features: int, scale_block: int) -> int:
    """Scale blocks of a row: ceil(in_features / scale_block)."""
    return -(-in_features // scale_block)


def even_block(in_features: int, most: int, *groups: int) -> int:
    """Columns of a scale block, at most `most`, where a row is divided as evenly as whole groups allow.

    Blocks are also whole 64 columns, what a kernel takes at a time, unless `most` is not.
    """
    unit = math.lcm(64, *groups)
    blocks = block_count(in_features, most)
    return min(most, -(-in_features // (blocks * unit)) * unit)


def expand_scales(
    scales: Float[Tensor, "*planes out blocks"], scale_block: int, in_features: int
) -> Float[Tensor, "*planes out in"]:
    """Each block's scale repeated over its columns; to be read only, as it need not be a copy."""
    if scales.shape[-1] == 1:
        return scales.expand(*scales.shape[:-1], in_features)
    return scales.repeat_interleave(min(scale_block, in_features), dim=-1)[..., :in_features]


def signs_of(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """+1 or −1 in the values' dtype; zero counts as positive, as everywhere in the paper."""
    signs = values.detach() + 0.0  # −0 becomes 0
    one = torch.ones((), dtype=signs.dtype, device=signs.device)
    return torch.copysign(one, signs, out=signs)  # in a fifth of the time that `where` takes
