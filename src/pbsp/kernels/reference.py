"""The product with a packed matrix in plain torch: it runs everywhere and defines the right answer."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.storage.layouts import Packed
from pbsp.storage.low_rank import PackedLowRank
from pbsp.storage.streams import row_tiles

_TILE_WEIGHTS = 1 << 22  # decoded weights alive at once: 16 MiB in float32


def packed_linear(
    x: Float[Tensor, "*batch in"], packed: Packed, bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """X Wᵀ + bias in x's dtype; differentiable in x and bias.

    W is decoded some rows at a time; of two factors each is multiplied with. In a rotated layout W is the
    matrix in its own basis, and x too.
    """
    if isinstance(packed, PackedLowRank):
        y = packed.unpack().product(x)
        return y if bias is None else y + bias
    products = []
    for low, high in _tiles(packed):
        tile = packed.rows(low, high).decode().to(x.dtype)
        products.append(torch.nn.functional.linear(x, tile, None if bias is None else bias[low:high]))
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def decode_dense(packed: Packed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The whole matrix in `dtype`, with no larger copy of it in between."""
    shape = packed.form.out_features, packed.form.in_features
    dense = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    for low, high in _tiles(packed):
        dense[low:high] = packed.rows(low, high).decode()
    return dense


def _tiles(packed: Packed) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `_TILE_WEIGHTS` weights."""
    return row_tiles(packed.form.out_features, packed.form.in_features, _TILE_WEIGHTS)
