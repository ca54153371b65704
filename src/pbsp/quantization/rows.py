"""Matrices in 8 or 4 bit: integers and float16 scales side by side in bytes.

8 bit: a row is `columns` signed bytes of −127…127 and a scale. 4 bit: a row is groups of 32 columns, each of
16 bytes and its scale; byte i holds the codes of columns i (low) and 16 + i (high), 0…15 for −7.5…7.5.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pbsp.binarization.rotation import unrotate

WIDTHS = (8, 4)
GROUP = 32  # columns that share a scale in 4 bit
_SCALE_BYTES = 2
_LARGEST = 127
_SHRINKS = tuple(1 - step / 20 for step in range(11))  # of the largest magnitude; 2 bits need a half
_ROWS_AT_ONCE = 4096


def width_for(columns: int, bits: int) -> int:
    """`bits`, or 8 where rows of so many columns have no whole groups."""
    return bits if columns % GROUP == 0 else 8


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row; 4.5 or a little over 8 bits a weight."""
    return columns + _SCALE_BYTES if bits == 8 else columns // GROUP * (GROUP // 2 + _SCALE_BYTES)


@dataclass(frozen=True)
class Steps:
    """Per row of a group of columns, the values scale · code: 255 around 0 in 8 bit, else 2^bits.

    Of these none is zero: an odd number of levels around zero would leave one out.

    Attributes:
        scales: float16 values, 0 or positive, held in float32.
        bits: 8, or up to 4.
    """

    scales: Float[Tensor, "rows"]
    bits: int

    @staticmethod
    def of(weight: Float[Tensor, "rows columns"], bits: int) -> "Steps":
        """In 8 bit the least scales that reach all weights; else those of `_SHRINKS` with the least squared
        error of weights rounded to the nearest value.
        """
        largest = weight.float().abs().amax(1)
        if bits == 8:
            return Steps(_half_at_least(largest / _LARGEST).float(), bits)
        best, least = None, None
        for shrink in _SHRINKS:
            steps = Steps((largest / _middle(bits) * shrink).clamp_max(65504).half().float(), bits)
            errors = (steps.values(steps.codes(weight)) - weight).square().sum(1)
            if best is None or least is None:
                best, least = steps, errors
            else:
                best = Steps(torch.where(errors < least, steps.scales, best.scales), bits)
                least = torch.minimum(errors, least)
        assert best is not None, "there are shrinks"
        return best

    def codes(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The codes of the nearest values, as whole numbers; what lies outside goes to the ends."""
        units = weight / self.scales.to(weight.dtype).clamp_min(1e-30)[:, None]
        if self.bits == 8:
            return units.round_().clamp_(-_LARGEST, _LARGEST)
        return units.add_(_middle(self.bits)).round_().clamp_(0, 2 * _middle(self.bits))

    def values(self, codes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """What the codes stand for."""
        units = codes if self.bits == 8 else codes - _middle(self.bits)
        return units * self.scales.to(codes.dtype)[:, None]


@dataclass(frozen=True)
class QuantizedRows:
    """A matrix as such bytes.

    Attributes:
        packed: see the module.
        bits: 8 or 4.
        rotation: of the basis that they are in, see `binarization.rotation`; 1: none.
    """

    packed: UInt8[Tensor, "out bytes"]
    bits: int
    rotation: int = 1

    def dense(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that the bytes stand for, in the basis of the layer's own inputs."""
        return unrotate(dequantize_rows(self.packed, self.bits), self.rotation)

    def split(self, rows: list[int]) -> list["QuantizedRows"]:
        """Consecutive runs of rows; copies, so that the whole can be freed."""
        return [replace(self, packed=part.clone()) for part in self.packed.split(rows)]

    @staticmethod
    def join(parts: list["QuantizedRows"]) -> "QuantizedRows":
        """The rows of `parts`, of equal width and bits, one below the other."""
        return replace(parts[0], packed=torch.cat([part.packed for part in parts]))

    @property
    def columns(self) -> int:
        """Weights of a row."""
        width = self.packed.shape[1]
        return width - _SCALE_BYTES if self.bits == 8 else width // row_bytes(GROUP, self.bits) * GROUP

    @property
    def nominal_bits(self) -> float:
        """Bits of a code alone, as papers count."""
        return float(self.bits)


def group_columns(columns: int, bits: int) -> int:
    """Columns that share a scale: in 8 bit all of a row."""
    return columns if bits == 8 else GROUP


def quantize_rows(weight: Float[Tensor, "rows columns"], bits: int = 8) -> UInt8[Tensor, "rows bytes"]:
    """The rows rounded to the nearest, as bytes; for 4 bits, columns must be whole groups."""
    return torch.cat([_quantized(part, bits) for part in weight.detach().split(_ROWS_AT_ONCE)])


def _quantized(weight: Tensor, bits: int) -> Tensor:
    groups = weight.float().reshape(-1, group_columns(weight.shape[1], bits))
    steps = Steps.of(groups, bits)
    return join_rows(steps.codes(groups).view(weight.shape), steps.scales.view(len(weight), -1), bits)


def join_rows(
    codes: Float[Tensor, "rows columns"], scales: Float[Tensor, "rows groups"], bits: int
) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of codes and scales as `Steps` has them."""
    halves = scales.half().view(torch.uint8).unflatten(1, (-1, _SCALE_BYTES))
    if bits == 8:
        return torch.cat([codes.to(torch.int8).view(torch.uint8), halves[:, 0]], 1)
    whole = codes.to(torch.uint8).unflatten(1, (-1, GROUP))
    pairs = whole[..., : GROUP // 2] | whole[..., GROUP // 2 :] << 4
    return torch.cat([pairs, halves], 2).flatten(1)


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
    return ((codes.float() - _middle(bits)) * row_scales(groups)).flatten(-2).to(dtype)


def _middle(bits: int) -> float:
    """The code of 0, between two whole ones."""
    return (2**bits - 1) / 2


def row_scales(packed: UInt8[Tensor, "*rows bytes"]) -> Float[Tensor, "*rows 1"]:
    """The scale at the end of every row (of every group, given groups), in float32."""
    halves = packed[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)  # else at odd bytes
    return halves.view(torch.float16).float()


def _half_at_least(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The least float16 that is not below each value; 0 stays 0."""
    rounded = values.half()
    below = rounded.float() < values
    return (rounded.view(torch.int16) + below.to(torch.int16)).view(torch.float16)
