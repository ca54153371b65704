"""Calls of transformers' attention functions, observed while a model runs, and their probabilities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function by a model, and what came out.

    Attributes:
        module: the attention module.
        implementation: the function's name in the model's config.
        eager: the same module's function that also returns probabilities.
        mask: as the function was given it; None means causal to sdpa, and no mask to eager.
        output: (1, tokens, heads, head_dim).
    """

    module: nn.Module
    implementation: str | None
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    query: Float[Tensor, "1 heads tokens key_dim"]
    key: Float[Tensor, "1 kv_heads tokens key_dim"]
    value: Float[Tensor, "1 kv_heads tokens head_dim"]
    mask: Tensor | None
    kwargs: dict[str, Any]
    output: Tensor

    def probabilities(self, rows: Int64[Tensor, "queries"]) -> Float[Tensor, "heads queries tokens"] | None:
        """What each query position in `rows` takes of each value; soft caps and sinks are the model's own."""
        mask = _mask_rows(self, rows)
        _, weights = self.eager(
            self.module, self.query[:, :, rows], self.key, self.value, mask, **self.kwargs
        )
        return None if weights is None else weights[0]


@contextmanager
def watched_attention(observe: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Tell `observe` of every call that a model makes through transformers' attention functions.

    Models ask one shared table for their function at each call; for the length of the context the
    table's answer reports before it returns. What the models compute does not change.
    """
    table = ALL_ATTENTION_FUNCTIONS
    lookup = table.get_interface

    def get_interface(implementation: str | None, default: Callable) -> Callable:
        function = lookup(implementation, default)  # pyright: ignore[reportArgumentType]

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            result = function(module, query, key, value, attention_mask, **kwargs)
            call = AttentionCall(
                module, implementation, default, query, key, value, attention_mask, kwargs, result[0]
            )
            observe(call)
            return result

        return attend

    vars(table)["get_interface"] = get_interface
    try:
        yield
    finally:
        del vars(table)["get_interface"]


def _mask_rows(call: AttentionCall, rows: Int64[Tensor, "queries"]) -> Tensor | None:
    """The mask of some query positions, as an eager attention function adds it to the scores."""
    dtype, tokens = call.query.dtype, call.query.shape[2]
    if call.mask is None:
        causal = call.kwargs.get("is_causal")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        if call.implementation != "sdpa" or not causal:
            return None
        allowed = torch.arange(tokens, device=rows.device) <= rows[:, None]
    else:
        allowed = call.mask.expand(*call.mask.shape[:-2], tokens, call.mask.shape[-1])[..., rows, :]
        if allowed.dtype != torch.bool:
            return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=rows.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )
