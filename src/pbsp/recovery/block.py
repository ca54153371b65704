"""Block reconstruction: tune a compressed block until its output is near the original block's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.binarization.planes import Planes
from pbsp.integrations.modules import replace_module
from pbsp.packed_linear import PackedLinear
from pbsp.recovery.tuned_planes import TunedPlanes

_HELD_OUT = 8  # one window in so many, the last ones, judges and is not trained on


@dataclass(frozen=True)
class Tuning:
    """How long and how fast.

    Attributes:
        epochs: passes over the windows that are not held out.
        rate: the largest step of a scale relative to itself, and of norms and biases.
    """

    epochs: int = 2
    rate: float = 2e-2


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
) -> BlockRecovery:
    """Tune the block's plane scales, norms and biases in place; it never ends worse than it began.

    The loss is |output − target|² / |target|² of every token: a few tokens have hidden states a thousand
    times as long as the others, and must not decide alone. Windows come one at a time, in order; the state
    that is best on the held-out windows is kept.

    Args:
        block: compressed; its packed linears of layout `planes` are tuned, and all vectors.
        run: calls the block on one window's hidden states.
        inputs: each window's, behind compressed blocks.
        targets: what the original block makes of the original's hidden states.
        tuning: see `Tuning`.
    """
    held = max(1, len(inputs) // _HELD_OUT)
    train = range(len(inputs) - held) if len(inputs) > held else range(len(inputs))
    judge = range(len(inputs) - held, len(inputs))

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(_loss(run(inputs[index]), targets[index])) for index in judge) / held

    with _tunable(block) as parameters:
        before = best = held_out()
        kept = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=tuning.rate, weight_decay=0.0)
        total = tuning.epochs * len(train)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=tuning.rate, total_steps=total + 1)
        steps = 0
        for _ in range(tuning.epochs):
            for index in train:
                with torch.enable_grad():
                    loss = _loss(run(inputs[index]), targets[index])
                    gradients = torch.autograd.grad(loss, parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                steps += 1
            now = held_out()
            if now < best:
                best, kept = now, [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None
    return BlockRecovery(name, before, best, steps)


@contextmanager
def _tunable(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The block with tunable planes while the context lasts, and packed ones after it."""
    tuned: dict[str, TunedPlanes] = {}
    for name, module in list(block.named_modules()):
        if isinstance(module, PackedLinear):
            planes = module.packed.unpack()
            if isinstance(planes, Planes):
                tuned[name] = TunedPlanes(planes, module.bias)
    conv1d = {name for name in tuned if getattr(block.get_submodule(name), "conv1d", False)}
    for name, module in tuned.items():
        replace_module(block, name, module)
    vectors = {
        id(parameter): parameter
        for parameter in block.parameters()
        if parameter.is_floating_point() and (parameter.ndim == 1 or _is_change(parameter, tuned))
    }
    parameters = list(vectors.values())
    wanted = {id(parameter): parameter.requires_grad for parameter in parameters}
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(wanted[id(parameter)])
        for name, module in tuned.items():
            packed = PackedLinear.of(module.planes(), module.bias)
            replace_module(block, name, packed)
            packed.conv1d = name in conv1d


def _is_change(parameter: nn.Parameter, tuned: dict[str, TunedPlanes]) -> bool:
    return any(parameter is module.change for module in tuned.values())


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the token's own length."""
    errors = (output.float() - target.float()).square().sum(-1)
    return (errors / target.float().square().sum(-1).clamp_min(1e-30)).mean()
