"""Products with packed planes by the compiled kernels, as operators of torch.

Few rows of activations are multiplied by the bits themselves; for many, tiles of rows are decoded once and
multiplied by torch. The operators take tensors and numbers alone, so that torch.compile and fake tensors
see them as one step.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.rotation import rotate, unrotate
from pbsp.compiled import ACTIVATIONS, DTYPES, activations, check, kernel_name, library
from pbsp.kernels.runtime import MatrixArguments, RuntimePlanes, matrix_struct, patterns_of
from pbsp.storage.planes import PlanesForm
from pbsp.storage.streams import row_tiles

_FEW_ROWS = 48  # divided by bytes of a number: up to here the bits beat decoding and a dense product
_TILE_WEIGHTS = 1 << 20  # decoded weights alive at once: 4 MiB in float32

_MATRIX = (
    "Tensor layout, Tensor scales, Tensor offsets, int[] patterns, int columns, int scale_block, int rotation"
)
torch.library.define("pbsp::planes_linear", f"(Tensor x, {_MATRIX}, Tensor? bias) -> Tensor")
torch.library.define("pbsp::planes_transposed", f"(Tensor y, {_MATRIX}) -> Tensor")


def planes_linear(
    x: Float[Tensor, "*batch in"], matrix: MatrixArguments, bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """X Wᵀ + bias in x's dtype (float32, bfloat16 or float16); differentiable in x and bias.

    A few rows of x (24; 12 with PBSP_ACTIVATIONS=float, 48 with int8) are taken as integers of 16 (32, 8)
    bits, in units of their own for each row and scale block; sums in a block are exact, and blocks are added
    in float32. Besides float32 rounding, a product differs from the exact one by at most 2⁻¹⁶ (2⁻³², 1/254)
    of the sum over blocks of scale · kept weights · largest |x|. More rows meet a decoded matrix, in float32,
    or in bfloat16 where that is faster.

    Args:
        x: activations on the CPU.
        matrix: `RuntimePlanes.arguments`.
        bias: added as it is.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, bias, *matrix)  # pyright: ignore[reportReturnType]
    return torch.ops.pbsp.planes_linear.default(x, *matrix, bias)


class _Linear(torch.autograd.Function):
    """The product with gradients; the backward pass decodes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *matrix: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*matrix[:3])
        ctx.numbers = matrix[3:]
        return torch.ops.pbsp.planes_linear(x, *matrix, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = torch.ops.pbsp.planes_transposed(grad, *ctx.saved_tensors, *ctx.numbers)
        if ctx.needs_input_grad[1]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        return x_grad, bias_grad, *(None,) * 7


@torch.library.impl("pbsp::planes_linear", "CPU")
def _linear(x: Tensor, *arguments: Any) -> Tensor:
    matrix, bias = arguments[:7], arguments[7]
    layout, columns = matrix[0], matrix[4]
    if x.shape[-1] != columns:
        raise RuntimeError(f"x has rows of {x.shape[-1]} numbers; the packed linear takes {columns}")
    x_rows, digits = x.numel() // columns, ACTIVATIONS[activations()]
    if x_rows * digits > _FEW_ROWS:
        rows = rotate(x.reshape(x_rows, columns).float(), matrix[6]).to(x.dtype)
        y = _dense_product(rows, _planes(matrix), bias)
        return y.view(*x.shape[:-1], layout.shape[0])
    y = x.new_empty(*x.shape[:-1], layout.shape[0])
    x = x.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    check(
        library().pbsp_multiply(
            kernel_name().encode(),
            ctypes.byref(matrix_struct(*matrix)),
            x.data_ptr(),
            y.data_ptr(),
            x_rows,
            DTYPES[x.dtype],
            None if bias is None else bias.data_ptr(),
            digits,
            torch.get_num_threads(),
        )
    )
    return y


@torch.library.impl("pbsp::planes_transposed", "CPU")
def _transposed(y: Tensor, *matrix: Any) -> Tensor:
    """Y W in y's dtype: the gradient of a product's input; summed in float32."""
    planes = _planes(matrix)
    rows = y.reshape(-1, y.shape[-1]).float()
    total = rows.new_zeros(len(rows), planes.form.in_features)
    for low, high in row_tiles(planes.form.out_features, planes.form.in_features, _TILE_WEIGHTS):
        total.addmm_(rows[:, low:high], planes.rows(low, high).decode())
    return unrotate(total, planes.form.rotation).to(y.dtype).view(*y.shape[:-1], -1)


@torch.library.register_fake("pbsp::planes_linear")
def _fake_linear(x: Tensor, layout: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], layout.shape[0])


@torch.library.register_fake("pbsp::planes_transposed")
def _fake_transposed(y: Tensor, *matrix: Any) -> Tensor:
    return y.new_empty(*y.shape[:-1], matrix[4])


def _dense_product(x: Tensor, planes: RuntimePlanes, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias in x's dtype, W decoded tile by tile, both in the planes' basis."""
    # 16-bit products are slower than float32 ones, but for processors with instructions for matrices.
    dtype = x.dtype if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else torch.float32
    y = x.new_empty(len(x), planes.form.out_features)
    rows = x.to(dtype)
    for low, high in row_tiles(planes.form.out_features, planes.form.in_features, _TILE_WEIGHTS):
        tile = planes.rows(low, high).decode(dtype)
        tile_bias = None if bias is None else bias[low:high].to(dtype)
        y[:, low:high] = torch.nn.functional.linear(rows, tile, tile_bias)
    return y


def _planes(matrix: MatrixArguments) -> RuntimePlanes:
    layout, scales, offsets, patterns, columns, scale_block, rotation = matrix
    planes = patterns_of(patterns)
    form = PlanesForm(planes, columns, layout.shape[0], scale_block, rotation, len(offsets) < len(planes))
    return RuntimePlanes(form, layout, scales, offsets)
