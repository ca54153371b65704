"""A plan is tried: what each layer's error costs where all the others are compressed, too.

Layers' errors are expected to add to the loss as they would one by one. In a compressed model they do not: on
SmolLM2-135M values cost twice and up projections two thirds of what is expected (docs/experiments.md).
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.block_run import BlockRun
from pbsp.config import Config
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.integrations.modules import dense_module, replace_module
from pbsp.models.blocks import decoder_blocks
from pbsp.models.memory import has_room
from pbsp.models.shards import shards_of
from pbsp.packed_linear import PackedLinear
from pbsp.planned import Planned
from pbsp.recovery.divergence import MOST_KEPT, divergence, little_kept


def can_try(model: PreTrainedModel, ranks: Ranks = ALONE) -> bool:
    """Whether the model is in memory as a whole, and every rank's copy and way back would fit there, too.

    Ranks have a GPU each, but on CPUs one memory, as far as is known.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    sharing = ranks.size if model.device.type == "cpu" else 1
    room = not shards_of(model) and has_room(sharing * (size + MOST_KEPT), model.device)
    return all(ranks.gather(room))


@torch.no_grad()
def trial_losses(
    model: PreTrainedModel,
    planned: Planned,
    config: Config,
    tokens: Int64[Tensor, "windows context"],
    *,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Nats per token that the error of each planned linear costs a model that is compressed as planned.

    A copy of the model is compressed, without sweeps, and asked `error_losses`. On SmolLM2-135M at 2.5 bits
    they sum up to the copy's divergence (0.529 of 0.533 nats). A linear that the windows do not reach is
    left out. In memory are the model twice, and what `little_kept` says.

    Args:
        model: one that `can_try`; it stays as it is.
        tokens: the windows of all ranks.
        progress: told the steps done, and all.

    Raises:
        CalibrationError: a layer cannot be solved.
    """
    tell = progress or (lambda done, total: None)
    tried = copy.deepcopy(model)
    blocks = decoder_blocks(tried)
    total = len(blocks) + len(tokens)
    fast = replace(config, recover="none", options={**config.options, "sweeps": 0})
    run = BlockRun(
        *(tried, blocks, planned, fast, defaultdict(float)),
        tell=lambda stage, done, _: tell(done, total),
        ranks=ranks,
    )
    for layer in run.compress_blocks(tokens):
        packed = tried.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear), "planes and integers are packed"
        replace_module(tried, layer.name, dense_module(packed, tried.dtype))
    progress = progress and (lambda done, _: tell(len(blocks) + done, total))
    names = list(planned.plan.entries)
    return error_losses(model, tried, names, tokens, progress=progress, ranks=ranks)


@torch.no_grad()
def error_losses(
    model: PreTrainedModel,
    changed: PreTrainedModel,
    names: list[str],
    tokens: Int64[Tensor, "windows context"],
    *,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """What the difference of each of these weights adds to KL(model ‖ changed), where all have theirs.

    Were one difference E scaled by s, the divergence would change as a·s², in nats per token:
    a = ½ ⟨∂KL/∂(W + E), E⟩. All are NaN where the divergence is not finite.
    """
    found = _Products(model, changed, names)
    products, part = found.products, ranks.part(len(tokens))
    try:
        blocks = [block.module for block in decoder_blocks(changed)]
        with little_kept(changed, blocks, lambda: divergence(changed, model, tokens[0])):
            for done, window in enumerate(tokens[part.start : part.stop]):
                if progress:
                    progress(done, len(part))
                with torch.enable_grad():
                    # a sum over tokens: gradients of a mean are small enough to vanish in 16 bit
                    (divergence(changed, model, window) * len(window)).backward()
    except CalibrationError:  # 16 bit can overflow; the other ranks wait all the same
        products = dict.fromkeys(names, float("nan"))
    shares = ranks.gather(products)
    reached = [name for name in names if any(name in share for share in shares)]
    return {name: sum(share.get(name, 0.0) for share in shares) / tokens.numel() / 2 for name in reached}


class _Products:
    """Sums ⟨gradient, E⟩ of every linear while gradients come, and keeps none of these."""

    def __init__(self, model: PreTrainedModel, changed: PreTrainedModel, names: list[str]) -> None:
        self.products: dict[str, float] = {}
        changed.requires_grad_(False)
        for name in names:
            weight = changed.get_submodule(name).get_parameter("weight").requires_grad_()
            original = model.get_submodule(name).get_parameter("weight")
            weight.register_post_accumulate_grad_hook(partial(self._add, name, original))

    def _add(self, name: str, original: nn.Parameter, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        error = weight.detach().float() - original.detach().float()
        product = float((weight.grad.float() * error).sum())
        self.products[name] = self.products.get(name, 0.0) + product
        weight.grad = None
