"""Block reconstruction: tune a compressed block until its output is near the original block's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.recovery.tunable import Tuning, tunable

BLOCK_TUNING = Tuning(epochs=4, rate=2e-2, code_rate=1e-2)
_HELD_OUT = 8  # one window in so many, the last ones, judges and is not trained on


@dataclass(frozen=True)
class BlockRecovery:
    """What tuning one block did.

    Attributes:
        before, after: relative squared error of the block's output on held-out windows, a mean over tokens.
        steps: updates made; those after the best state are not kept.
    """

    name: str
    before: float
    after: float
    steps: int


def recover_block(
    name: str,
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    inputs: Sequence[Float[Tensor, "1 tokens features"]],
    targets: Sequence[Float[Tensor, "1 tokens features"]],
    tuning: Tuning,
    *,
    originals: Mapping[str, Tensor],
) -> BlockRecovery:
    """Tune the block's planes, norms and biases in place; it never ends worse than it began.

    The loss is |output − target|² / |target|² of every token: a few tokens have hidden states a thousand
    times as long as the others, and must not decide alone. Windows come one at a time, in order; the state
    that is best on the held-out windows is kept.

    Args:
        block: compressed; its packed linears of layout `planes` are tuned, and all vectors.
        run: calls the block on one window's hidden states.
        inputs: each window's, behind compressed blocks.
        targets: what the original block makes of the original's hidden states.
        tuning: see `Tuning`.
        originals: weights of the block's linears, by name in the block; for tuning codes.
    """
    held = max(1, len(inputs) // _HELD_OUT)
    train = range(len(inputs) - held) if len(inputs) > held else range(len(inputs))
    judge = range(len(inputs) - held, len(inputs))

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(_loss(run(inputs[index]), targets[index])) for index in judge) / held

    steps = tuning.epochs * len(train)
    with tunable(block, tuning, steps=steps, originals=originals) as chosen:
        before = best = held_out()
        kept = chosen.values()
        for _ in range(tuning.epochs):
            for index in train:
                with torch.enable_grad():
                    _loss(run(inputs[index]), targets[index]).backward(inputs=chosen.leaves())
                chosen.step()
            now = held_out()
            if now < best:
                best, kept = now, chosen.values()
        chosen.restore(kept)
    return BlockRecovery(name, before, best, steps)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the token's own length."""
    errors = (output.float() - target.float()).square().sum(-1)
    return (errors / target.float().square().sum(-1).clamp_min(1e-30)).mean()
