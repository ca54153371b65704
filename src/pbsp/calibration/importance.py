"""How important each decoder block is: what coarse allocations rank by. One walk over the original each."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.walk import Walk
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.models.blocks import Block, is_listed, linear_weight
from pbsp.models.shards import resident
from pbsp.pruning.scores import ScoreInputs, si

_OUTLYING = 6  # times the mean of a linear's scores


@torch.no_grad()
def block_cosines(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Int64[Tensor, "windows context"],
    *,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Each block's mean cosine between the hidden states before and behind it, over all tokens.

    Args:
        model: the original, in evaluation mode.
        blocks: its decoder blocks.
        tokens: calibration windows.
        ranks: processes that share the windows.

    Raises:
        CalibrationError: a block's hidden states are not finite; names the block.
    """
    walk = _walk(model, blocks, tokens, ranks)
    found = []
    for index, block in enumerate(blocks):
        total = 0.0
        with resident(model, block.name):
            for window, before in enumerate(walk.hidden):
                walk.hidden[window] = walk.replay(index, block.module, before)
                total += float(token_cosines(before, walk.hidden[window]).sum())
        found.append(total)
    totals = [math.fsum(parts) for parts in zip(*ranks.gather(found), strict=True)]
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


@torch.no_grad()
def outlier_ratios(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Int64[Tensor, "windows context"],
    *,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Each block's share of weights whose standardized importance is above six times its linear's mean.

    Args:
        model: the original, on its device, in evaluation mode.
        blocks: its decoder blocks.
        tokens: calibration windows.
        ranks: processes that share the windows.

    Raises:
        CalibrationError: a linear layer's inputs are not finite, or it has none; names the layer.

    Source: STBLLM (arXiv 2408.01803), after OWL (arXiv 2310.05175).
    """
    walk = _walk(model, blocks, tokens, ranks)
    ratios = []
    for index, block in enumerate(blocks):
        with resident(model, block.name):
            energies = _input_energies(block, partial(walk.run, index, block.module, keep=True), ranks)
            ratios.append(
                _outlier_ratio(block, {name: sums / tokens.numel() for name, sums in energies.items()})
            )
    return ratios


def _input_energies(block: Block, run: Callable[[], None], ranks: Ranks) -> dict[str, Tensor]:
    """The sums of squares of each linear's inputs over the tokens that all ranks' `run` call it on."""
    energies: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            energy = args[0].reshape(-1, args[0].shape[-1]).float().square().sum(0)
            energies[name] = energies[name] + energy if name in energies else energy

        return before

    with ExitStack() as hooks:
        for name, module in block.linears().items():
            hooks.enter_context(module.register_forward_pre_hook(watch(name)))
        run()
    summed: dict[str, Tensor] = {}
    for found in ranks.gather(energies):
        for name, energy in found.items():
            summed[name] = summed[name] + energy if name in summed else energy
    return summed


def _walk(model: PreTrainedModel, blocks: list[Block], tokens: Tensor, ranks: Ranks) -> Walk:
    """Over this rank's windows."""
    own = ranks.part(len(tokens))
    return Walk(model, blocks, tokens[own.start : own.stop])


def _outlier_ratio(block: Block, energies: dict[str, Tensor]) -> float:
    outlying = weights = 0
    for name, module in block.linears().items():
        if name not in energies and is_listed(block, name):
            continue  # an expert that no token was sent to
        if name not in energies or not bool(torch.isfinite(energies[name]).all()):
            raise CalibrationError(f"{name}: its inputs are missing, NaN or infinite on the calibration text")
        weight = linear_weight(module).float()
        scores = si(ScoreInputs(weight, energies[name], torch.ones_like(energies[name])))
        outlying += int((scores > _OUTLYING * scores.mean()).sum())
        weights += scores.numel()
    return outlying / weights
