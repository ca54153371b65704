"""A model's decoder blocks and the linear layers in them, found by the model's own description."""

from collections import Counter
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pbsp.errors import ModelError

LINEAR_TYPES = (nn.Linear, Conv1D)
_LEAST_LINEAR_SHARE = 0.9  # of a block's matrix weights; below it the block holds weights we cannot see


@dataclass(frozen=True)
class Block:
    """One decoder block: its name in the model and its module."""

    name: str
    module: nn.Module

    def linears(self) -> dict[str, nn.Module]:
        """Full name → linear layer, in the order of definition; a layer with two names comes once.

        Routers of experts are left out: they are never compressed.
        """
        routers = _routers(self.module)
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, LINEAR_TYPES) and module not in routers
        }


def decoder_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks in order: the longest list of modules that the model says must not be split.

    Raises:
        ModelError: the model names no such modules, is already compressed, or a block keeps more than
            a tenth of its matrix weights outside linear layers (fused experts that `split_experts` has not
            replaced).
    """
    if getattr(model, "is_quantized", False):
        raise ModelError("the model is already quantized; compress the original instead")
    whole = set(model._no_split_modules or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(type(m).__name__ in whole for m in module)
    ]
    if not lists:
        raise ModelError(
            f"no decoder blocks found in {type(model).__name__}: no list of modules is made of the classes "
            f"in its _no_split_modules ({', '.join(sorted(whole)) or 'empty'}), so it is unsupported"
        )
    list_name, modules = max(lists, key=lambda item: len(item[1]))
    blocks = [Block(f"{list_name}.{index}", module) for index, module in enumerate(modules)]
    for block in blocks:
        _refuse_hidden_weights(block)
    return blocks


def _routers(block: nn.Module) -> set[nn.Module]:
    """Linears beside a list of experts that score the experts, or gate one that is shared: by their width."""
    found: set[nn.Module] = set()
    for holder in block.modules():
        for experts in [child for child in holder.children() if isinstance(child, nn.ModuleList)]:
            inside = set(experts.modules())
            beside = [m for m in holder.modules() if isinstance(m, LINEAR_TYPES) and m not in inside]
            found.update(m for m in beside if linear_weight(m).shape[0] in (1, len(experts)))
    return found


def _refuse_hidden_weights(block: Block) -> None:
    """Raise ModelError if linear layers hold too small a share of the block's matrices."""
    linear_ids = {id(module.weight) for module in block.linears().values()}
    sizes: Counter[bool] = Counter()
    largest = ("", 0)
    for name, parameter in block.module.named_parameters():
        if parameter.ndim < 2:
            continue
        known = id(parameter) in linear_ids
        sizes[known] += parameter.numel()
        if not known and parameter.numel() > largest[1]:
            largest = (name, parameter.numel())
    share = sizes[True] / max(sizes.total(), 1)
    if share < _LEAST_LINEAR_SHARE:
        raise ModelError(
            f"{block.name} ({type(block.module).__name__}) keeps only {share:.0%} of its weights in linear "
            f"layers; {largest[0] or 'the rest'} is of a kind that cannot be compressed (experts fused in a "
            "way unknown here?)"
        )


def linear_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The layer's weight as (out, in); GPT-2's Conv1D keeps its transpose."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def is_listed(block: Block, name: str) -> bool:
    """Whether the linear is one of alternatives, such as experts: a module of a list inside the block."""
    inner = name.removeprefix(f"{block.name}.").split(".")
    return any(
        isinstance(block.module.get_submodule(".".join(inner[:depth])), nn.ModuleList)
        for depth in range(len(inner))
    )
