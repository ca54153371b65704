"""From scores to a mask: which N of every M consecutive weights are kept."""

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

_COMPARED = 16
"""Scores of a group that are compared pair by pair, up to which that takes half of a sort's time or less."""


def keep_largest(
    scores: Float[Tensor, "out in"], count: int, group: int, *, among: Bool[Tensor, "out in"] | None = None
) -> Bool[Tensor, "out in"]:
    """True for the `count` largest scores of every `group` consecutive entries of a row.

    Ties go to the lowest index. With `among`, only entries that are True there can be kept; each
    group must have at least `count` of them.
    """
    if among is not None:
        scores = scores.masked_fill(~among, -torch.inf)
    if group <= _COMPARED:
        return (_ahead(scores.reshape(-1, group).T.contiguous()) < count).T.reshape(scores.shape)
    grouped = scores.reshape(len(scores), -1, group)
    order = grouped.sort(dim=2, descending=True, stable=True).indices
    keep = torch.zeros_like(grouped, dtype=torch.bool)
    return keep.scatter_(2, order[:, :, :count], True).view_as(scores)


def _ahead(scores: Float[Tensor, "group groups"]) -> Int8[Tensor, "group groups"]:
    """How many of its column are larger, or as large and before it; every pair is compared once."""
    places = torch.arange(len(scores) - 1, -1, -1, dtype=torch.int8, device=scores.device)
    ahead = places[:, None].repeat(1, scores.shape[1])  # as if all that follow were
    for apart in range(1, len(scores)):
        first = (scores[:-apart] >= scores[apart:]).view(torch.int8)
        ahead[apart:] += first
        ahead[:-apart] -= first
    return ahead
