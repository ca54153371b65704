"""How far a whole model's predictions are from the original's, with a way back that fits in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pbsp.errors import CalibrationError
from pbsp.evaluation.divergence import token_divergence

MOST_KEPT = 2 << 30
"""Bytes of a window's way forward; what takes more is computed again, for a fifth of a step's time."""


def divergence(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    window: Int64[Tensor, "context"],
) -> Tensor:
    """KL(teacher ‖ model) in nats per token, with a gradient for the model where that is enabled.

    Raises:
        CalibrationError: it is not finite.
    """
    tokens = window[None].to(model.device)
    with torch.no_grad():
        wanted = teacher(input_ids=tokens, use_cache=False).logits[0]
    found = model(input_ids=tokens, use_cache=False).logits[0]
    mean = token_divergence(wanted, found).mean()
    if not bool(torch.isfinite(mean)):
        raise CalibrationError(
            "the compressed model's divergence from the original is not finite; if it is being tuned, lower "
            "the rates"
        )
    return mean


@contextmanager
def little_kept(
    model: PreTrainedModel, blocks: list[nn.Module], forward: Callable[[], Tensor]
) -> Iterator[None]:
    """While it lasts, the model keeps at most 2 GiB of such a `forward` for the way back.

    Where that is too little, it is the hidden states before every block, which is then computed again.
    """
    if _kept_bytes(model, forward) > MOST_KEPT:
        with _checkpointed(blocks):
            yield
    else:
        yield


def _kept_bytes(model: PreTrainedModel, forward: Callable[[], Tensor]) -> int:
    """At most so many bytes `forward` keeps for the way back, weights not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    total, nothing = 0, torch.empty(0)

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in weights:
            total += tensor.nbytes
        return nothing

    with torch.enable_grad(), saved_tensors_hooks(count, lambda kept: kept):
        forward()
    return total


@contextmanager
def _checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """While it lasts, the blocks keep no more than their input for the way back."""
    for block in blocks:
        block.forward = partial(_again, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
