"""The product with packed planes in plain torch: it runs everywhere and defines the right answer."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.planes import expand_scales
from pbsp.binarization.scales import decode_scales
from pbsp.storage.packing import PackedPlanes, split_planes, unpack_signs

_TILE_WEIGHTS = 1 << 22  # decoded weights alive at once: 16 MiB in float32


def packed_linear(
    x: Float[Tensor, "*batch in"], packed: PackedPlanes, bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """X Wᵀ + bias in x's dtype, W decoded some rows at a time; differentiable in x and bias."""
    products = []
    for low, high in _tiles(packed):
        tile = decode_rows(packed.rows(low, high)).to(x.dtype)
        products.append(torch.nn.functional.linear(x, tile, None if bias is None else bias[low:high]))
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def decode_dense(packed: PackedPlanes, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The whole matrix in `dtype`, with no larger copy of it in between."""
    dense = torch.empty(len(packed.codes), packed.in_features, dtype=dtype, device=packed.codes.device)
    for low, high in _tiles(packed):
        dense[low:high] = decode_rows(packed.rows(low, high))
    return dense


@torch.no_grad()
def decode_rows(packed: PackedPlanes) -> Float[Tensor, "out in"]:
    """All rows of `packed` in float32, summed in plane order: equal to `Planes.dense`, bit for bit."""
    in_features, scale_block = packed.in_features, packed.scale_block
    blocks = packed.scales.shape[1] // len(packed.patterns)
    scale_codes = packed.scales.split(blocks, 1)
    total = None
    for codes, pattern, plane_scales, offset in zip(
        split_planes(packed), packed.patterns, scale_codes, packed.offsets.tolist(), strict=True
    ):
        plane = unpack_signs(codes, pattern, in_features).to(torch.float32)
        scales = decode_scales(plane_scales, offset)
        if in_features == blocks * scale_block:  # three times faster than a scale for every weight
            plane.view(-1, blocks, scale_block).mul_(scales[:, :, None])
        else:
            plane *= expand_scales(scales, scale_block, in_features)
        total = plane if total is None else total.add_(plane)
    assert total is not None, "there is at least one plane"
    return total


def _tiles(packed: PackedPlanes) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `_TILE_WEIGHTS` weights."""
    rows = len(packed.codes)
    step = max(1, _TILE_WEIGHTS // packed.in_features)
    return ((low, min(low + step, rows)) for low in range(0, rows, step))
