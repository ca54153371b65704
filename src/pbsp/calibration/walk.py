"""The block-by-block walk: each decoder block is called alone, with the arguments its model gave it."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.errors import CalibrationError, ModelError
from pbsp.models.blocks import Block

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative RMS; 16-bit types round at 1e-2


@dataclass(frozen=True)
class BlockCall:
    """How the model called a block, hidden states aside: what follows them, and the keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None  # the hidden states' own keyword, where they are not the first argument

    def replay(self, block: nn.Module, hidden: Float[Tensor, "1 tokens features"]) -> Tensor:
        """The block's output hidden states for `hidden`."""
        if self.hidden_keyword is None:
            output = block(hidden, *self.args, **self.kwargs)
        else:
            output = block(*self.args, **{self.hidden_keyword: hidden}, **self.kwargs)
        return hidden_of(output)


class _FirstBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass whose first block input has been recorded."""


class Walk:
    """The hidden states of all calibration windows at the entrance of one block, moved on block by block.

    Args:
        model: on its device, in evaluation mode.
        blocks: all its decoder blocks, in order.
        tokens: calibration windows, (windows, context).

    Raises:
        CalibrationError: the model's own hidden states are not finite; names the block.
        ModelError: replaying the first window block by block does not give the model's own hidden
            states, or the windows are not all called alike; every later number would be wrong.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[Block], tokens: Int64[Tensor, "windows context"]):
        self._calls, states = _record_first_window(model, blocks, tokens[:1])
        _verify(blocks, self._calls, states)
        first = _first_inputs(model, blocks[0], tokens, self._calls[0])
        self.hidden = list(first)

    def run(self, index: int, block: nn.Module, *, keep: bool) -> None:
        """Call block `index`, as `block`, on every window; with `keep` its outputs are the next inputs."""
        for window, hidden in enumerate(self.hidden):
            output = self.replay(index, block, hidden)
            if keep:
                self.hidden[window] = output

    def replay(self, index: int, block: nn.Module, hidden: Float[Tensor, "1 tokens features"]) -> Tensor:
        """What block `index`, as `block`, makes of one window's hidden states."""
        return self._calls[index].replay(block, hidden)


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states, whether it returns them alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    return _split_call(args, kwargs)[0]


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states of a recorded call, and the rest of it."""
    if args:
        return args[0], BlockCall(args[1:], kwargs, None)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest, "hidden_states")


def _record_first_window(
    model: PreTrainedModel, blocks: list[Block], tokens: Tensor
) -> tuple[list[BlockCall], list[Tensor]]:
    """Every block's call in the model's own forward, and the hidden states before, between and after them."""
    calls: list[BlockCall] = []
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        calls.append(call)
        states.append(hidden.clone())

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(hidden_of(output).clone())

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(blocks[-1].module.register_forward_hook(after))
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    if len(calls) != len(blocks):
        raise ModelError(
            f"{type(model).__name__} called its {len(blocks)} decoder blocks {len(calls)} times in one pass; "
            "only models that call each block once can be compressed"
        )
    return calls, states


def _verify(blocks: list[Block], calls: list[BlockCall], states: list[Tensor]) -> None:
    """Walk the first window through all blocks and compare with the model's own hidden states."""
    hidden = states[0]
    for block, call, expected in zip(blocks, calls, states[1:], strict=True):
        if not bool(torch.isfinite(expected).all()):
            raise CalibrationError(
                f"{block.name}: the model's own output there is NaN or infinite on the text"
            )
        hidden = call.replay(block.module, hidden)
        error = float((hidden - expected).double().norm() / expected.double().norm().clamp_min(1e-30))
        if not error <= _TOLERANCE.get(expected.dtype, 1e-2):
            raise ModelError(
                f"calling {block.name} alone gives other hidden states than the model's own forward "
                f"(relative difference {error:.2g}); this architecture cannot be compressed block by block"
            )


def _first_inputs(
    model: PreTrainedModel, block: Block, tokens: Tensor, expected: BlockCall
) -> Iterator[Tensor]:
    """Each window's hidden states at the first block; the forward pass is left there."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        if not _same((call.args, call.kwargs), (expected.args, expected.kwargs)):
            raise ModelError(
                f"{block.name} is called with other arguments for another window of equal length"
            )
        seen.append(hidden.clone())
        raise _FirstBlockReached

    with block.module.register_forward_pre_hook(before, with_kwargs=True):
        for window in tokens:
            try:
                model.base_model(input_ids=window[None].to(model.device), use_cache=False)
            except _FirstBlockReached:
                yield seen.pop()


def _same(left: Any, right: Any) -> bool:
    """Equal recorded arguments: tensors by value, containers by their parts, objects by type."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, (int, float, str, bool)) or left is None:
        return left == right
    return type(left) is type(right)
