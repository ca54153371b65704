"""How much each decoder block changes its hidden states: what the paper's coarse allocation ranks by."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.walk import block_input, hidden_of
from pbsp.errors import CalibrationError
from pbsp.models.blocks import Block


@torch.no_grad()
def block_cosines(
    model: PreTrainedModel, blocks: list[Block], tokens: Int64[Tensor, "windows context"]
) -> list[float]:
    """Each block's mean cosine between the hidden states before and behind it, over all tokens.

    One forward pass of the model as it is; a walk that has been started is not touched.

    Args:
        model: the original, on its device, in evaluation mode.
        blocks: its decoder blocks.
        tokens: calibration windows.

    Raises:
        CalibrationError: a block's hidden states are not finite; names the block.
    """
    totals = [0.0] * len(blocks)
    before: dict[int, Tensor] = {}

    def entry(index: int) -> Callable[..., None]:
        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before[index] = block_input(args, kwargs)

        return entered

    def exit_(index: int) -> Callable[..., None]:
        def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            totals[index] += float(token_cosines(before.pop(index), hidden_of(output)).sum())

        return left

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.enter_context(block.module.register_forward_pre_hook(entry(index), with_kwargs=True))
            hooks.enter_context(block.module.register_forward_hook(exit_(index)))
        for window in tokens:
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    for block, total in zip(blocks, totals, strict=True):
        if not math.isfinite(total):
            raise CalibrationError(f"{block.name}: its hidden states are NaN or infinite on the text")
    return [total / tokens.numel() for total in totals]


def token_cosines(
    before: Float[Tensor, "*tokens features"], behind: Float[Tensor, "*tokens features"]
) -> Float[Tensor, "*tokens"]:
    """cos(before, behind) of every token, in float64: blocks in the middle differ in 1 − cos ≈ 1e-3 only.

    A token without a direction, all zero, has cosine 0; one that is not finite has NaN.
    """
    x, y = before.double(), behind.double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    return (x * y).sum(-1) / torch.where(norms == 0, 1.0, norms)
