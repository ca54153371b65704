"""The 8-bit number format of plane scales (E3M5), rounded here so that solvers fit what is stored.

A scale is code → mantissa · 2^(exponent + offset), an unsigned minifloat with three exponent and five
mantissa bits, IEEE-like: codes below 32 are subnormal and code 0 is exactly zero. `offset` is one
integer per plane of a matrix, so the largest scale of the plane fits. Every scale is m·2^k with m < 64:
exact in float16, bfloat16 and float32 alike, on every machine.
"""

import torch
from jaxtyping import Float, Int8, Int32, UInt8
from torch import Tensor

MANTISSA_BITS = 5
LARGEST_CODE = 255
_HIDDEN_BIT = 1 << MANTISSA_BITS
_LARGEST_EXPONENT = (LARGEST_CODE >> MANTISSA_BITS) - 1  # 6: exponent field 7, where field 0 and 1 share 2^0
_LARGEST_MANTISSA = 2 * _HIDDEN_BIT - 1
_OFFSET_RANGE = (-126, 100)  # subnormal steps stay normal float32 numbers


def scale_offset(scales: Float[Tensor, "out blocks"]) -> int:
    """The smallest offset under which the largest of the non-negative `scales` does not overflow."""
    largest = float(scales.max()) if scales.numel() else 0.0
    if largest == 0.0:
        return _OFFSET_RANGE[0]
    # Under offset k the largest value is 63·2^(6+k); half a step more still rounds down to it.
    exponent = torch.frexp(torch.tensor(largest / (_LARGEST_MANTISSA + 0.5)))[1].item()
    return int(min(max(exponent - _LARGEST_EXPONENT, _OFFSET_RANGE[0]), _OFFSET_RANGE[1]))


def encode_scales(scales: Float[Tensor, "out blocks"], offset: int) -> UInt8[Tensor, "out blocks"]:
    """Codes of the nearest representable scales, ties to even; values out of range are clamped."""
    mantissa, exponent = torch.frexp(scales.clamp_min(0.0))  # 0.5 ≤ mantissa < 1
    step = (exponent - (MANTISSA_BITS + 1) - offset).clamp(0, _LARGEST_EXPONENT)
    steps = _ldexp(mantissa, exponent - offset - step).round().clamp(max=2 * _HIDDEN_BIT).to(torch.int32)
    # Consecutive codes are consecutive values, so a mantissa rounded up to 64 carries into the exponent.
    code = ((step << MANTISSA_BITS) + steps).clamp(0, LARGEST_CODE)
    return torch.where(mantissa == 0, 0, code).to(torch.uint8)


def decode_scales(codes: UInt8[Tensor, "out blocks"], offset: int) -> Float[Tensor, "out blocks"]:
    """The float32 scales that `codes` stand for; exact."""
    code = codes.to(torch.int32)
    field = code >> MANTISSA_BITS
    fraction = code & (_HIDDEN_BIT - 1)
    mantissa = torch.where(field > 0, fraction + _HIDDEN_BIT, fraction)
    return _ldexp(mantissa.to(torch.float32), (field - 1).clamp_min(0) + offset)


def round_scales(scales: Float[Tensor, "planes out blocks"]) -> Float[Tensor, "planes out blocks"]:
    """The nearest stored scales of each plane, as float32; idempotent."""
    rounded = [decode_scales(encode_scales(plane, k := scale_offset(plane)), k) for plane in scales]
    return torch.stack(rounded)


def scale_offsets(scales: Float[Tensor, "planes out blocks"]) -> Int8[Tensor, "planes"]:
    """One offset per plane, as it is stored."""
    return torch.tensor([scale_offset(plane) for plane in scales], dtype=torch.int8)


def _ldexp(
    values: Float[Tensor, "out blocks"], exponent: Int32[Tensor, "out blocks"]
) -> Float[Tensor, "out blocks"]:
    """values · 2^exponent, for exponents from -252 to 254.

    torch.ldexp asks the device for a power, which need not be exact there; here its two halves are made from
    the bits of a float32.
    """
    half = exponent >> 1
    for part in (half, exponent - half):
        values = values * ((part + 127) << 23).view(torch.float32)
    return values
