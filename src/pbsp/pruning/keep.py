"""From scores to a mask: which N of every M consecutive weights are kept."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def keep_largest(
    scores: Float[Tensor, "out in"], count: int, group: int, *, among: Bool[Tensor, "out in"] | None = None
) -> Bool[Tensor, "out in"]:
    """True for the `count` largest scores of every `group` consecutive entries of a row.

    Ties go to the lowest index. With `among`, only entries that are True there can be kept; each
    group must have at least `count` of them.
    """
    if among is not None:
        scores = scores.masked_fill(~among, -torch.inf)
    grouped = scores.reshape(len(scores), -1, group)
    order = grouped.sort(dim=2, descending=True, stable=True).indices
    keep = torch.zeros_like(grouped, dtype=torch.bool)
    return keep.scatter_(2, order[:, :, :count], True).view_as(scores)
