"""Embeddings in 8 or 4 bit: integers and float16 scales side by side in bytes.

8 bit: a row is `columns` signed bytes of −127…127 and a scale. 4 bit: a row is groups of 32 columns, each of
16 bytes and its scale; byte i holds the codes of columns i (low) and 16 + i (high), 0…15 for −7.5…7.5.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

WIDTHS = (8, 4)
GROUP = 32  # columns that share a scale in 4 bit
_SCALE_BYTES = 2
_LARGEST = 127
_MIDDLE = 7.5
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the largest magnitude; less never was the best
_ROWS_AT_ONCE = 4096


def width_for(columns: int, bits: int) -> int:
    """`bits`, or 8 where rows of so many columns have no whole groups."""
    return bits if columns % GROUP == 0 else 8


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row; 4.5 or a little over 8 bits a weight."""
    return columns + _SCALE_BYTES if bits == 8 else columns // GROUP * (GROUP // 2 + _SCALE_BYTES)


def quantize_rows(weight: Float[Tensor, "rows columns"], bits: int = 8) -> UInt8[Tensor, "rows bytes"]:
    """The rows as bytes, `bits` 8 or 4; for 4, columns must be whole groups."""
    parts = weight.detach().split(_ROWS_AT_ONCE)
    return torch.cat([_quantize_bytes(part) if bits == 8 else _quantize_nibbles(part) for part in parts])


def dequantize_rows(
    packed: UInt8[Tensor, "*rows bytes"], bits: int = 8, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows columns"]:
    """The values that the bytes stand for, rounded once to `dtype`."""
    if bits == 8:
        codes = packed[..., :-_SCALE_BYTES].view(torch.int8)
        return (codes.float() * row_scales(packed)).to(dtype)
    groups = packed.unflatten(-1, (-1, GROUP // 2 + _SCALE_BYTES))
    pairs = groups[..., :-_SCALE_BYTES]
    codes = torch.cat([pairs & 15, pairs >> 4], -1)
    return ((codes.float() - _MIDDLE) * row_scales(groups)).flatten(-2).to(dtype)


def row_scales(packed: UInt8[Tensor, "*rows bytes"]) -> Float[Tensor, "*rows 1"]:
    """The scale at the end of every row (of every group, given groups), in float32."""
    halves = packed[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)  # else at odd bytes
    return halves.view(torch.float16).float()


def _quantize_bytes(weight: Tensor) -> Tensor:
    """The scale is the least float16 value with which the row's largest magnitude is at most 127.

    Symmetric, so that a product needs no sums of its inputs; one scale a row, so that it comes after the sum.
    """
    largest = weight.float().abs().amax(1, keepdim=True)
    scale = _half_at_least(largest / _LARGEST)
    codes = (weight.float() / scale.float().clamp_min(1e-30)).round().clamp(-_LARGEST, _LARGEST)
    return torch.cat([codes.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], 1)


def _quantize_nibbles(weight: Tensor) -> Tensor:
    """The scale is that of `_SHRINKS` whose codes have the least squared error.

    No code is zero: sixteen levels, where an odd number of them around zero would leave one out.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    largest = groups.abs().amax(2, keepdim=True) / _MIDDLE
    best, least = None, None
    for shrink in _SHRINKS:
        scale = (largest * shrink).clamp_max(65504).half()
        codes = (groups / scale.float().clamp_min(1e-30) + _MIDDLE).round_().clamp_(0, 15)
        errors = ((codes - _MIDDLE) * scale.float() - groups).square().sum(2, keepdim=True)
        if best is None or least is None:
            best, least = (codes, scale), errors
        else:
            better = errors < least
            best = (torch.where(better, codes, best[0]), torch.where(better, scale, best[1]))
            least = torch.minimum(errors, least)
    assert best is not None, "there are shrinks"
    codes, scale = best[0].to(torch.uint8), best[1]
    pairs = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
    return torch.cat([pairs, scale.view(torch.uint8)], 2).flatten(1)


def _half_at_least(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The least float16 that is not below each value; 0 stays 0."""
    rounded = values.half()
    below = rounded.float() < values
    return (rounded.view(torch.int16) + below.to(torch.int16)).view(torch.float16)
