"""Products with 8-bit rows (`quantization.rows`) as an operator of torch, compiled for few rows of x."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pbsp.compiled import REFERENCE, check, kernel_name, library
from pbsp.quantization.rows import SCALE_BYTES, row_scales

_FEW_ROWS = 16  # of activations; more meet decoded tiles
_TILE_BYTES = 1 << 21  # of codes decoded at once: their float32 values are in a core's cache

torch.library.define("pbsp::rows_linear", "(Tensor x, Tensor rows) -> Tensor")


def rows_linear(
    x: Float[Tensor, "*batch in"], rows: UInt8[Tensor, "out bytes"]
) -> Float[Tensor, "*batch out"]:
    """X Wᵀ in x's dtype, W in 8-bit rows; differentiable in x.

    A few rows of x are multiplied with the integers in float32, sums in a fixed order; for more, the
    integers are decoded some rows at a time. Scales come after the sums.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _by_tiles(x, rows)
    return torch.ops.pbsp.rows_linear.default(x, rows)


def _by_tiles(x: Tensor, rows: Tensor) -> Tensor:
    step = max(1, _TILE_BYTES // rows.shape[1])
    parts = [
        torch.nn.functional.linear(x, tile[:, :-SCALE_BYTES].view(torch.int8).to(x.dtype))
        for tile in rows.split(step)
    ]
    return torch.cat(parts, -1) * row_scales(rows).to(x.dtype)[:, 0]


@torch.library.impl("pbsp::rows_linear", "default")
def _rows_linear(x: Tensor, rows: Tensor) -> Tensor:
    count = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or not 0 < count <= _FEW_ROWS or kernel_name() == REFERENCE:
        return _by_tiles(x, rows)
    numbers = x.reshape(count, -1).float().contiguous()
    packed = rows.contiguous()
    result = torch.empty(count, len(packed), dtype=torch.float32)
    check(
        library().pbsp_multiply_bytes(
            kernel_name().encode(),
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
def _rows_linear_fake(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[0])
