"""The loss's gradient at the outputs of linear layers, block by block from the last to the first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.states import States, copied, no_states
from pbsp.calibration.walk import Walk
from pbsp.errors import CalibrationError, ModelError
from pbsp.models.blocks import Block
from pbsp.models.shards import OUTSIDE, resident

Watch = Callable[[int, str, Tensor, Tensor], None]
"""(window, linear, its input (1, tokens, in), the gradient at its output (1, tokens, out)) → nothing."""


class BackwardWalk:
    """One forward pass over all windows, then the gradients of each block's linears, the last block first.

    The loss of a window is the sum of its tokens' negative log likelihoods, so a token's gradient does
    not depend on how many others there are. Held are the hidden states of all windows before every block,
    windows × context × features × blocks numbers, see `States`, and the graph of one block and window.

    Args:
        model: on its device, or read block by block; in evaluation mode.
        blocks: all its decoder blocks, in order.
        tokens: calibration windows, (windows, context).

    Raises:
        CalibrationError, ModelError: as `Walk`; or what follows the blocks cannot be run alone.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[Block], tokens: Int64[Tensor, "windows context"]):
        self._model = model
        self._blocks = blocks
        self._walk = Walk(model, blocks, tokens)
        self._entries: list[States] = []
        for index, block in enumerate(blocks):
            self._entries.append(copied(model, self._walk.hidden))
            with resident(model, block.name):
                self._walk.run(index, block.module, keep=True)
        self._gradients = no_states(model)
        with resident(model, OUTSIDE):
            rest = _Rest(model, blocks, tokens[:1], self._walk)
            for window, output in zip(tokens, self._walk.hidden, strict=True):
                self._gradients.append(rest.gradient(window[None], output))
        self._next = len(blocks) - 1

    def step(self, watch: Watch) -> None:
        """Go back through the last block that is left, and tell `watch` of its linears on every window.

        Raises:
            CalibrationError: a gradient is not finite; names the block.
        """
        with resident(self._model, self._blocks[self._next].name):
            self._step(self._next, watch)
        self._next -= 1

    def _step(self, index: int, watch: Watch) -> None:
        block = self._blocks[index]
        for window, hidden in enumerate(self._entries.pop()):
            with torch.enable_grad():
                entry = hidden.detach().requires_grad_()
                with _calls_of(block) as calls:
                    output = self._walk.replay(index, block.module, entry)
                wanted = [entry, *(result for _, _, result in calls)]
                found = torch.autograd.grad(output, wanted, self._gradients[window], allow_unused=True)
            self._gradients[window] = found[0]
            if not bool(torch.isfinite(found[0]).all()):
                raise CalibrationError(f"{block.name}: the gradient of the loss there is NaN or infinite")
            for (name, inputs, _), gradient in zip(calls, found[1:], strict=True):
                if gradient is not None:
                    watch(window, name, inputs, gradient)


@contextmanager
def _calls_of(block: Block) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Collects name, input and output of every linear of the block that is called."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls.append((name, args[0].detach(), output))

    hooks = [module.register_forward_hook(after(name)) for name, module in block.linears().items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Rest:
    """What follows the decoder blocks: the final norm and the head, run alone.

    Raises:
        ModelError: what the norm returns then differs from the model's own for the first window.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: list[Block], first: Int64[Tensor, "1 context"], walk: Walk
    ):
        self._model = model
        self._modules = [block.module for block in blocks]
        self._tuples = walk.first.tuples
        expected = walk.first.output
        with _skipped(self._modules, self._returned(walk.hidden[0])):
            found = model.base_model(input_ids=first.to(model.device), use_cache=False)[0]
        error = float((found - expected).double().norm() / expected.double().norm().clamp_min(1e-30))
        if not error <= 1e-2:
            raise ModelError(
                f"what follows the decoder blocks of {type(model).__name__} cannot be run alone (its output "
                f"differs by {error:.2g}); gradients are not to be had: use weighting plain or attention"
            )

    def gradient(
        self, tokens: Int64[Tensor, "1 context"], output: Float[Tensor, "1 context features"]
    ) -> Float[Tensor, "1 context features"]:
        """The gradient of the window's loss at the last block's output."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            with _skipped(self._modules, self._returned(leaf)):
                logits = self._logits(tokens)[0, :-1].float()
            targets = tokens[0, 1:].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            return torch.autograd.grad(loss, leaf)[0]

    def _logits(self, tokens: Tensor) -> Tensor:
        return self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples else hidden


@contextmanager
def _skipped(modules: list[nn.Module], result: Any) -> Iterator[None]:
    """While it lasts, the modules do nothing and return `result`."""
    for module in modules:
        module.forward = lambda *args, **kwargs: result
    try:
        yield
    finally:
        for module in modules:
            del module.forward
