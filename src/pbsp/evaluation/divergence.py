"""How far one model's predictions are from another's: maths on logits, in memory that does not grow."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 64 << 20
_TEMPORARIES = (
    6  # float32 copies of a chunk that are alive at once: two logits, two log-softmaxes, two products
)


def token_losses(
    logits: Float[Tensor, "positions vocabulary"], targets: Int64[Tensor, "positions"]
) -> Float[Tensor, "positions"]:
    """Negative log-likelihood of each target in nats, float32 whatever the logits' type."""
    rows = _rows_at_once(logits.shape[1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts])


def token_divergence(
    original: Float[Tensor, "positions vocabulary"], logits: Float[Tensor, "positions vocabulary"]
) -> Float[Tensor, "positions"]:
    """KL(original ‖ model) over the whole vocabulary in nats.

    In float32, whatever the logits' types; `original` may lie on another device.
    """
    divergences = []
    rows = _rows_at_once(logits.shape[1])
    # `split`, as each slice by itself would have a gradient as large as all logits
    for reference, ours in zip(original.split(rows), logits.split(rows), strict=True):
        log_p = reference.to(logits.device).float().log_softmax(-1)
        divergences.append(
            F.kl_div(ours.float().log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)
        )
    return torch.cat(divergences)


def same_top_token(
    original: Float[Tensor, "positions vocabulary"], logits: Float[Tensor, "positions vocabulary"]
) -> Bool[Tensor, "positions"]:
    """Whether both rank the same token first; `original` may lie on another device."""
    return original.argmax(-1).to(logits.device) == logits.argmax(-1)


def _rows_at_once(vocabulary: int) -> int:
    """Positions whose temporaries take at most CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (_TEMPORARIES * 4 * vocabulary))
