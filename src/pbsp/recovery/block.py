"""Block reconstruction: tune a compressed block until its output is near the original block's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.models.products import quick_products
from pbsp.recovery.tunable import Tunable, Tuning, tunable

ADAPTING = Tuning(epochs=2, rate=4e-4, code_rate=0.0)
BLOCK_TUNING = Tuning(epochs=4, rate=2e-2, code_rate=1e-2)
_HELD_OUT = 8  # one window in so many, the last ones, judges and is not trained on


@dataclass(frozen=True)
class BlockRecovery:
    """What tuning one block did, in relative squared errors of its output on held-out windows.

    Attributes:
        inherited: of the uncompressed block, on what its compressed predecessors give; None where its
            weights were not tuned.
        adapted: of the same, its weights tuned to that.
        before, after: of the compressed block.
        steps: updates made to it; those after the best state are not kept.
    """

    name: str
    inherited: float | None
    adapted: float | None
    before: float
    after: float
    steps: int


class BlockTask:
    """What a block shall do: from every window's inputs, behind compressed blocks, to its target.

    The loss is |output − target|² / |target|² of every token, their mean: a few tokens have hidden states a
    thousand times as long as the others, and must not decide alone.

    Args:
        run: calls the block, as it is at the time, on one window's hidden states.
        inputs: each window's.
        targets: what the original block makes of the original's hidden states.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        inputs: Sequence[Float[Tensor, "1 tokens features"]],
        targets: Sequence[Float[Tensor, "1 tokens features"]],
    ) -> None:
        self._run, self._inputs, self._targets = run, inputs, targets
        self._held = max(1, len(inputs) // _HELD_OUT)
        self.train = range(len(inputs) - self._held) if len(inputs) > self._held else range(len(inputs))

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the windows that are not trained on."""
        judge = range(len(self._inputs) - self._held, len(self._inputs))
        return sum(float(self._loss(window)) for window in judge) / self._held

    def tune(self, chosen: Tunable, epochs: int) -> tuple[float, float]:
        """Windows come one at a time, in order; the state that is best on the held-out ones is kept.

        Returns their loss before and after; it is never worse.
        """
        before = best = self.held_out()
        kept = chosen.values()
        for _ in range(epochs):
            for window in self.train:
                with torch.enable_grad():
                    self._loss(window).backward(inputs=chosen.leaves())
                chosen.step()
            now = self.held_out()
            if now < best:
                best, kept = now, chosen.values()
        chosen.restore(kept)
        return before, best

    def _loss(self, window: int) -> Tensor:
        x, target = self._inputs[window], self._targets[window].float()
        with quick_products(x.dtype, x.device):
            output = self._run(x).float()
        errors = (output - target).square().sum(-1)
        return (errors / target.square().sum(-1).clamp_min(1e-30)).mean()


def adapt_block(
    weights: Mapping[str, nn.Parameter], task: BlockTask, tuning: Tuning = ADAPTING
) -> tuple[float, float]:
    """Tune an uncompressed block's linears, in place, to the inputs that its compressed predecessors give.

    What is compressed afterwards then makes up for a part of their errors.

    Returns the held-out loss before and after.

    Source: "error propagation mitigation" of NanoQuant (arXiv 2602.06694).
    """
    parameters = list(weights.values())
    chosen = Tunable([], parameters, tuning, tuning.epochs * len(task.train))
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        return task.tune(chosen, tuning.epochs)
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None


def recover_block(
    block: nn.Module, task: BlockTask, *, originals: Mapping[str, Tensor], tuning: Tuning = BLOCK_TUNING
) -> tuple[float, float, int]:
    """Tune a compressed block's packed layers, norms and biases in place; it never ends worse than it began.

    Args:
        block: see `tunable`.
        originals: weights of the block's linears, by name in the block; for tuning codes.

    Returns the held-out loss before and after, and the steps made.
    """
    steps = tuning.epochs * len(task.train)
    with tunable(block, tuning, steps=steps, originals=originals) as chosen:
        return *task.tune(chosen, tuning.epochs), steps
