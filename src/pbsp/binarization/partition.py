"""Which kept weights of a block are binarized together: salient columns apart, the rest by magnitude.

Both searches compare squared errors of binarization without a mean: sums of |w| then give every
candidate at once, and the joint refit that follows sets the means.
"""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

MOST_SALIENT = 50
_BINS = 64  # of |w| up to the block's largest; a split point is a bin's edge


def salient_columns(
    weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], saliency: Float[Tensor, "out in"]
) -> Bool[Tensor, "in"]:
    """The columns that are worth two binary terms, at most 50 and at most half of them.

    Columns are ranked by the sum of the saliency of their kept weights; how many are taken is
    searched by the error that binarizing them twice and the others once leaves.

    Source: BiLLM (arXiv 2402.04291), structural search; arXiv 2502.01705, section 3.
    """
    order = (saliency * keep).sum(0).argsort(descending=True, stable=True)
    size = (weight.abs() * keep)[:, order]
    count = keep[:, order].to(size.dtype)
    most = min(MOST_SALIENT, weight.shape[1] // 2)
    # What one α explains of a set of weights is (Σ|w|)² / n; suffix sums give it for every "others".
    rest = _explained(_suffix_sums(size), _suffix_sums(count))[:, : most + 1].sum(0)
    gains = [rest[0]]
    for taken in range(1, most + 1):
        first, kept = size[:, :taken], count[:, :taken]
        number = kept.sum(1, keepdim=True)
        alpha = first.sum(1, keepdim=True) / number.clamp_min(1)
        second = ((first - alpha).abs() * kept).sum(1, keepdim=True)
        twice = _explained(first.sum(1, keepdim=True), number) + _explained(second, number)
        gains.append(twice.sum() + rest[taken])
    best = int(torch.stack(gains).argmax())
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[order[:best]] = True
    return salient


def magnitude_groups(
    weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], *, groups: int
) -> UInt8[Tensor, "out in"]:
    """Each weight's magnitude group, the small ones first; split points are searched on kept weights.

    Two groups are split at one point p₁, three at p₁ and p₂ = 2·p₁. Entries that are not kept get the
    group of their magnitude too.

    Source: BiLLM (arXiv 2402.04291), splitting search; STBLLM (arXiv 2408.01803), trisection search.
    """
    size = weight.abs()
    largest = (size * keep).amax()
    if groups == 1 or largest == 0:
        return torch.zeros_like(weight, dtype=torch.uint8)
    bins = (size / largest * _BINS).long().clamp_max(_BINS - 1)
    kept = keep.to(size.dtype)
    empty = size.new_zeros(len(weight), _BINS)
    total = torch.nn.functional.pad(empty.scatter_add(1, bins, size * kept).cumsum(1), (1, 0))
    count = torch.nn.functional.pad(empty.scatter_add(1, bins, kept).cumsum(1), (1, 0))
    first = torch.arange(1, _BINS // (groups - 1) + (groups == 3), device=weight.device)
    splits = [first * multiple for multiple in range(1, groups)]
    edges = [torch.zeros_like(first), *splits, torch.full_like(first, _BINS)]
    explained = [
        _explained(total[:, high] - total[:, low], count[:, high] - count[:, low])
        for low, high in pairwise(edges)
    ]
    best = torch.stack(explained).sum((0, 1)).argmax()
    return torch.stack([bins >= split[best] for split in splits]).sum(0).to(torch.uint8)


def _explained(total: Tensor, count: Tensor) -> Tensor:
    """(Σ|w|)² / n: by how much the best single α lowers the squared error of n weights."""
    return total.square() / count.clamp_min(1)


def _suffix_sums(values: Tensor) -> Tensor:
    """Sum of the columns from j on, for j = 0 … all of them."""
    sums = values.flip(1).cumsum(1).flip(1)
    return torch.nn.functional.pad(sums, (0, 1))
