"""The search for the best code of a group, compiled; `codebook` says what is looked for."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from pbsp.compiled import REFERENCE, check, kernel_name, library
from pbsp.pruning.pattern import Pattern

_WIDEST_GROUP = 64
_MOST_CODES = 1 << 16
"""All 29,120 codes of 4:16 take 4 µs for a group of a row, a descent by swaps more, to a worse code."""


def searches(values: Tensor, pattern: Pattern) -> bool:
    """Whether `search_codes` can be called for these correlations and is worth it."""
    if values.device.type != "cpu" or values.dtype != torch.float32 or pattern.group > _WIDEST_GROUP:
        return False
    return pattern.code_count <= _MOST_CODES and kernel_name() != REFERENCE


def search_codes(
    correlation: Float[Tensor, "group rows"],
    metric: Float[Tensor, "group group"],
    scale: Float[Tensor, "rows"],
    pattern: Pattern,
) -> Float[Tensor, "group rows"]:
    """See `codebook.best_codes`; every code is tried, on all of torch's threads.

    A row's code does not depend on the instruction set, nor on the other rows. Of two codes that fit
    equally the one whose support comes first, in lexicographic order, is taken.
    """
    codes = torch.empty_like(correlation, memory_format=torch.contiguous_format)
    given = [tensor.contiguous() for tensor in (correlation, metric, scale)]
    check(
        library().pbsp_best_codes(
            kernel_name().encode(),
            pattern.kept,
            pattern.group,
            *(tensor.data_ptr() for tensor in given),
            codes.data_ptr(),
            correlation.shape[1],
            torch.get_num_threads(),
        )
    )
    return codes


def searches_vectors(values: Tensor) -> bool:
    """Whether `search_vectors` can be called for these correlations."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and kernel_name() != REFERENCE


def search_vectors(
    correlation: Float[Tensor, "group rows"],
    metric: Float[Tensor, "group group"],
    scale: Float[Tensor, "rows"],
    vectors: Int8[Tensor, "codes group"],
) -> Float[Tensor, "group rows"]:
    """See `codebook.best_vectors`; of two that fit equally the first is taken."""
    found = torch.empty_like(correlation, memory_format=torch.contiguous_format)
    given = [tensor.contiguous() for tensor in (correlation, metric, scale)]
    check(
        library().pbsp_best_vectors(
            kernel_name().encode(),
            vectors.data_ptr(),
            len(vectors),
            *(tensor.data_ptr() for tensor in given),
            found.data_ptr(),
            correlation.shape[1],
            torch.get_num_threads(),
        )
    )
    return found


def search_points(values: Float[Tensor, "groups group"]) -> Float[Tensor, "groups group"]:
    """See `codebook.nearest_points`; to be called where `searches_vectors`."""
    given = values.contiguous()
    found = torch.empty_like(given)
    check(
        library().pbsp_nearest_points(
            kernel_name().encode(), given.data_ptr(), found.data_ptr(), len(given), torch.get_num_threads()
        )
    )
    return found
