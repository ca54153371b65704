"""The compensated sweep: approximate a matrix block by block, let later columns absorb the error."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

MODES = ("exact", "diagonal", "none")
Approximate = Callable[[Tensor, slice, Tensor], Tensor]
"""(target (out, block), columns, metric (block, block)) → approximation (out, block)."""


def compensated_sweep(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    approximate: Approximate,
    *,
    block: int,
    panel: int = 128,
    mode: str = "exact",
) -> Float[Tensor, "out in"]:
    """Approximate `block` columns at a time; the columns to the right are moved to cancel the error.

    `approximate` sees the moved target of its block and the metric in which an error there costs
    what is left of it after the best correction by all later columns: G = (U_bbᵀ U_bb)⁻¹. With
    E = (W_b − Q_b) U_bb⁻¹ the rest moves by −E U_b,rest, which is the exact optimum for a block
    fitted as a whole; dividing by diag(U_bb) alone, as the code of BiLLM, ARB-LLM and STBLLM does, is not.

    Args:
        weight: the target; not changed.
        factor: upper U with Uᵀ U = H⁻¹ (`hessian.inverse_factor`), in the weight's dtype.
        approximate: called once per block, left to right.
        block: columns per call; the last block may be narrower.
        panel: columns after which the far right is moved at once. Changes speed alone.
        mode: "exact"; "diagonal" divides by diag(U_bb), as those papers' code; "none" moves nothing.

    Returns:
        The approximation (out, in), blocks joined.

    Source: OBC (arXiv 2208.11580) and GPTQ (arXiv 2210.17323), for blocks instead of columns.
    """
    columns = weight.shape[1]
    panel = max(panel // block, 1) * block
    target = weight.clone()
    result = torch.empty_like(weight)
    for start in range(0, columns, panel):
        stop = min(start + panel, columns)
        errors = torch.empty_like(target[:, start:stop])
        for low in range(start, stop, block):
            high = min(low + block, stop)
            triangle = factor[low:high, low:high]
            result[:, low:high] = approximate(target[:, low:high], slice(low, high), block_metric(triangle))
            error = target[:, low:high] - result[:, low:high]
            if mode == "exact":
                error = torch.linalg.solve_triangular(triangle, error, upper=True, left=False)
            elif mode == "diagonal":
                error = error / triangle.diagonal()
            else:
                error.zero_()
            errors[:, low - start : high - start] = error
            target[:, high:stop] -= error @ factor[low:high, high:stop]
        target[:, stop:] -= errors @ factor[start:stop, stop:]
    return result


def block_metric(triangle: Float[Tensor, "block block"]) -> Float[Tensor, "block block"]:
    """(U_bbᵀ U_bb)⁻¹: the Schur complement of the block in what is left of the hessian."""
    identity = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    return inverse @ inverse.T
