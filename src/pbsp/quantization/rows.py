"""Embeddings in 8 bit: every row a scale and integers of −127…127, side by side in bytes."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

SCALE_BYTES = 2
_LARGEST = 127


def quantize_rows(weight: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """Each row as `columns` signed bytes and the two of its float16 scale, low byte first.

    The scale is the least float16 value with which the row's largest magnitude is at most 127. Symmetric,
    so that a product needs no sums of its inputs; one scale a row, so that it comes after the sum.
    """
    largest = weight.detach().float().abs().amax(1, keepdim=True)
    scale = _half_at_least(largest / _LARGEST)
    codes = (weight.float() / scale.float().clamp_min(1e-30)).round().clamp(-_LARGEST, _LARGEST)
    return torch.cat([codes.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], 1)


def dequantize_rows(
    packed: UInt8[Tensor, "*rows bytes"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows columns"]:
    """The values that the bytes stand for, rounded once to `dtype`."""
    codes = packed[..., :-SCALE_BYTES].view(torch.int8)
    return (codes.float() * row_scales(packed)).to(dtype)


def row_scales(packed: UInt8[Tensor, "*rows bytes"]) -> Float[Tensor, "*rows 1"]:
    """The scale of every row, in float32."""
    halves = packed[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)  # else at odd bytes
    return halves.view(torch.float16).float()


def _half_at_least(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The least float16 that is not below each value; 0 stays 0."""
    rounded = values.half()
    below = rounded.float() < values
    return (rounded.view(torch.int16) + below.to(torch.int16)).view(torch.float16)
