"""Embeddings and heads that hold their matrix in 8 or 4 bit; tied, they hold one matrix."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from pbsp.kernels.rows import rows_linear
from pbsp.quantization.rows import dequantize_rows, row_bytes


class _Rows(nn.Module):
    """A matrix of quantized rows, called `weight` as the dense one was, so that it is tied as that was.

    Attributes:
        rows, columns: of the matrix.
        bits: of a number, 8 or 4.
        dtype: of what is computed with it; a plain tensor's would follow `model.to(dtype)`, bytes do not.
    """

    weight: nn.Parameter

    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        bits: int = 8,
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        empty = torch.empty(rows, row_bytes(columns, bits), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.dtype = dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """The matrix, decoded."""
        return dequantize_rows(self.weight.detach(), self.bits, dtype)

    def set_rows(self, packed: UInt8[Tensor, "rows bytes"]) -> None:
        """Hold these bytes of `quantization.rows`."""
        self.weight = nn.Parameter(packed, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Rows":
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        self.dtype = probe.dtype
        return super()._apply(fn, recurse)


class PackedEmbedding(_Rows):
    """What `nn.Embedding` does, from quantized rows."""

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch features"]:
        """Decode the rows of these tokens."""
        return dequantize_rows(self.weight.detach()[tokens], self.bits, self.dtype)


class PackedHead(_Rows):
    """What a linear layer without bias does, from quantized rows."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """X Wᵀ in x's dtype, see `kernels.rows`."""
        return rows_linear(x, self.weight.detach(), self.bits)
