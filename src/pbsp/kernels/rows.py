"""Products with quantized rows (`quantization.rows`) as an operator of torch, compiled for few rows of x."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pbsp.compiled import REFERENCE, check, kernel_name, library
from pbsp.quantization.rows import dequantize_rows

_FEW_ROWS = 16  # of activations; more meet decoded tiles
_TILE_WEIGHTS = 1 << 21  # decoded at once: their float32 values are in a core's cache

torch.library.define("pbsp::rows_linear", "(Tensor x, Tensor rows, int bits) -> Tensor")


def rows_linear(
    x: Float[Tensor, "*batch in"], rows: UInt8[Tensor, "out bytes"], bits: int = 8
) -> Float[Tensor, "*batch out"]:
    """X Wᵀ in x's dtype, W in rows of 8 or 4 bit; differentiable in x.

    A few rows of x are multiplied with the integers in float32, sums in a fixed order; for more, rows are
    decoded some at a time.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _by_tiles(x, rows, bits)
    return torch.ops.pbsp.rows_linear.default(x, rows, bits)


def _by_tiles(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    tiles = rows.split(max(1, _TILE_WEIGHTS // x.shape[-1]))
    parts = [torch.nn.functional.linear(x, dequantize_rows(tile, bits, x.dtype)) for tile in tiles]
    return torch.cat(parts, -1)


@torch.library.impl("pbsp::rows_linear", "default")
def _rows_linear(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    count = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or not 0 < count <= _FEW_ROWS or kernel_name() == REFERENCE:
        return _by_tiles(x, rows, bits)
    numbers = x.reshape(count, -1).float().contiguous()
    packed = rows.contiguous()
    result = torch.empty(count, len(packed), dtype=torch.float32)
    check(
        library().pbsp_multiply_rows(
            kernel_name().encode(),
            bits,
            packed.data_ptr(),
            len(packed),
            numbers.shape[1],
            numbers.data_ptr(),
            count,
            result.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return result.to(x.dtype).view(*x.shape[:-1], len(packed))


@torch.library.register_fake("pbsp::rows_linear")
def _rows_linear_fake(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[0])
