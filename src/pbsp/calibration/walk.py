"""The block-by-block walk: each decoder block is called alone, with the arguments its model gave it."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.states import States, no_states
from pbsp.errors import CalibrationError, ModelError
from pbsp.models.blocks import Block
from pbsp.models.shards import OUTSIDE, resident

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
        model: on its device, or read block by block; in evaluation mode.
        blocks: all its decoder blocks, in order.
        tokens: calibration windows, (windows, context).

    Attributes:
        hidden: every window's hidden states.
        first: what the model's own forward did with the first window.

    Raises:
        CalibrationError: the model's own hidden states are not finite; names the block.
        ModelError: replaying the first window block by block does not give the model's own hidden
            states, or the windows are not all called alike; every later number would be wrong.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[Block], tokens: Int64[Tensor, "windows context"]):
        self.hidden: States = no_states(model)
        with resident(model, OUTSIDE):
            self.first = _walk_first_window(model, blocks, tokens[:1])
            _add_first_inputs(self.hidden, model, blocks[0], tokens, self.first.calls[0])

    def run(self, index: int, block: nn.Module, *, keep: bool) -> None:
        """Call block `index`, as `block`, on every window; with `keep` its outputs are the next inputs.

        The block's weights are in memory, see `resident`.
        """
        for window, hidden in enumerate(self.hidden):
            output = self.replay(index, block, hidden)
            if keep:
                self.hidden[window] = output

    def replay(self, index: int, block: nn.Module, hidden: Float[Tensor, "1 tokens features"]) -> Tensor:
        """What block `index`, as `block`, makes of one window's hidden states."""
        return self.first.calls[index].replay(block, hidden)


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states, whether it returns them alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states of a recorded call, and the rest of it."""
    if args:
        return args[0], BlockCall(args[1:], kwargs, None)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest, "hidden_states")


def _walk_first_window(model: PreTrainedModel, blocks: list[Block], tokens: Tensor) -> "FirstWindow":
    """Run the model on the first window, and each block once more by itself where the model has called it."""
    watch = FirstWindow(blocks)
    with ExitStack() as hooks:
        parts = hooks.enter_context(ExitStack())  # the one block that is called
        for index, block in enumerate(blocks):

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = block.name
            ) -> None:
                if not watch.replaying:
                    parts.enter_context(resident(model, name))
                    watch.enter(args, kwargs)

            def after(module: nn.Module, args: tuple[Any, ...], output: Any, index: int = index) -> None:
                if not watch.replaying:
                    watch.leave(index, output)
                    parts.close()

            hooks.enter_context(block.module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.module.register_forward_hook(after))
        watch.output = model.base_model(input_ids=tokens.to(model.device), use_cache=False)[0]
    if len(watch.calls) != len(blocks):
        raise ModelError(
            f"{type(model).__name__} called its {len(blocks)} decoder blocks {len(watch.calls)} times in one "
            "pass; only models that call each block once can be compressed"
        )
    return watch


class FirstWindow:
    """The model's own forward on one window, compared with a walk through its blocks as it goes on.

    Attributes:
        calls: of every block.
        tuples: whether the last block returns one.
        output: what the model without its head returns.
        replaying: whether a block is being called by the walk.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.calls: list[BlockCall] = []
        self.tuples = False
        self.output = torch.empty(0)
        self.replaying = False
        self._blocks = blocks
        self._walked: Tensor | None = None

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model calls its next block."""
        hidden, call = _split_call(args, kwargs)
        self.calls.append(call)
        if self._walked is None:
            self._walked = hidden.clone()

    def leave(self, index: int, output: Any) -> None:
        """Block `index` has returned; walk through it, and compare the hidden states."""
        block, expected = self._blocks[index], hidden_of(output)
        self.tuples = isinstance(output, tuple)
        if not bool(torch.isfinite(expected).all()):
            raise CalibrationError(
                f"{block.name}: the model's own output there is NaN or infinite on the text"
            )
        assert self._walked is not None, "it has been entered"
        self.replaying = True
        self._walked = self.calls[-1].replay(block.module, self._walked)
        self.replaying = False
        error = float((self._walked - expected).double().norm() / expected.double().norm().clamp_min(1e-30))
        if not error <= _TOLERANCE.get(expected.dtype, 1e-2):
            raise ModelError(
                f"calling {block.name} alone gives other hidden states than the model's own forward "
                f"(relative difference {error:.2g}); this architecture cannot be compressed block by block"
            )


def _add_first_inputs(
    into: States, model: PreTrainedModel, block: Block, tokens: Tensor, expected: BlockCall
) -> None:
    """Add each window's hidden states at the first block; the forward pass is left there."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        if not _same((call.args, call.kwargs), (expected.args, expected.kwargs)):
            raise ModelError(
                f"{block.name} is called with other arguments for another window of equal length"
            )
        into.append(hidden.clone())
        raise _FirstBlockReached

    with block.module.register_forward_pre_hook(before, with_kwargs=True):
        for window in tokens:
            with suppress(_FirstBlockReached):
                model.base_model(input_ids=window[None].to(model.device), use_cache=False)


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
