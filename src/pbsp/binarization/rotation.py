"""A rotated basis of a layer's inputs: signs, then a Hadamard matrix for every run of columns.

R = D·H: D is the diagonal of `column_signs`, H has normalised Hadamard matrices along its diagonal. A
weight W becomes W·R and its input x becomes x·R, as row vectors; R is orthogonal, so their product stays
what it was.

Source: the incoherence processing of QuIP# (arXiv 2402.04396), there with matrices as wide as the rows.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.errors import ConfigError

SIZES = (1, 4, 16, 64, 256, 1024, 4096)
"""Powers of four: the normalising factor 1/√size is exact. 1 means no rotation."""

_ROWS_AT_ONCE = 512  # of a moment


def check_rotation(rotation: int) -> None:
    """Raise ConfigError unless Hadamard matrices have this size."""
    if rotation not in SIZES:
        raise ConfigError(f"rotation is {rotation}; choose one of {', '.join(map(str, SIZES))} (1: none)")


def rotation_for(columns: int, largest: int) -> int:
    """The largest size up to `largest` that divides the columns."""
    return max(size for size in SIZES if size <= largest and columns % size == 0)


def rotate(x: Float[Tensor, "*batch columns"], size: int) -> Float[Tensor, "*batch columns"]:
    """x·R, in x's dtype; differentiable in x."""
    if size == 1:
        return x
    if torch.compiler.is_compiling():
        return torch.ops.pbsp.rotate(x, size)
    return _rotate(x, size)


def unrotate(x: Float[Tensor, "*batch columns"], size: int) -> Float[Tensor, "*batch columns"]:
    """x·Rᵀ, what `rotate` undoes."""
    if size == 1:
        return x
    signs, matrix = _factors(x.shape[-1], size, x.dtype, x.device)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2) * signs  # the matrix is symmetric


def rotate_moment(moment: Float[Tensor, "in in"], size: int) -> Float[Tensor, "in in"]:
    """Rᵀ·S·R, the moment of rotated inputs; in place, as moments can be most of the memory in use."""
    if size > 1:
        for side in (moment, moment.T):
            for rows in side.split(_ROWS_AT_ONCE):
                rows.copy_(rotate(rows, size))
    return moment


def column_signs(columns: int) -> Float[Tensor, "columns"]:
    """D: −1 where the lowest bit of the column's number is set after the mixing at the end of MurmurHash3."""
    mixed = torch.arange(columns, dtype=torch.int64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return 1.0 - 2.0 * ((mixed ^ (mixed >> 16)) & 1).float()


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """Sylvester's matrix, normalised: entry (i, j) is (−1)^popcount(i AND j) / √size."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@cache
def _factors(columns: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what is made in it could not be used in training later
        return column_signs(columns).to(device, dtype), hadamard(size).to(device, dtype)


def _rotate(x: Tensor, size: int) -> Tensor:
    signs, matrix = _factors(x.shape[-1], size, x.dtype, x.device)
    return ((x * signs).unflatten(-1, (-1, size)) @ matrix).flatten(-2)


# One step in graphs of torch.compile, which would trace how the factors are made.
torch.library.define("pbsp::rotate", "(Tensor x, int size) -> Tensor")
torch.library.impl("pbsp::rotate", "default", _rotate)
torch.library.register_fake("pbsp::rotate", lambda x, size: torch.empty_like(x))
torch.library.register_autograd(
    "pbsp::rotate",
    lambda ctx, gradient: (unrotate(gradient, ctx.size), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "size", inputs[1]),
)
