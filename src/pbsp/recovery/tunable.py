"""A compressed module made tunable for a while: packed layers, norms and biases."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.planes import Planes
from pbsp.integrations.modules import replace_module
from pbsp.packed_linear import PackedLinear
from pbsp.recovery.tuned_linear import TunedLinear
from pbsp.recovery.tuned_low_rank import TunedLowRank
from pbsp.recovery.tuned_planes import TunedPlanes


@dataclass(frozen=True)
class Tuning:
    """How long and how fast.

    Attributes:
        epochs: passes over the windows that are not held out.
        rate: the largest step of a scale relative to itself, and of norms and biases; None: found for a whole
            model by its divergence from the original, see `recovery.model`.
        code_rate: the largest step of the latents of codes, in units of their scale; 0 leaves codes alone.
    """

    epochs: int
    rate: float | None
    code_rate: float


class Tunable:
    """The parameters of one module, or of all, and a step of torch's AdamW over them."""

    def __init__(self, layers: list[TunedLinear], vectors: list[nn.Parameter], tuning: Tuning, steps: int):
        if tuning.rate is None:
            raise ValueError("tuning without a rate")
        self.layers = layers
        self.vectors = vectors
        scales = [change for layer in layers for change in layer.changes()]
        latents = [latents for layer in layers for latents in layer.codes()]
        groups = [{"params": [*vectors, *scales], "lr": tuning.rate}]
        if latents:
            groups.append({"params": latents, "lr": tuning.code_rate})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=[group["lr"] for group in groups], total_steps=steps + 1
        )

    def leaves(self) -> list[nn.Parameter]:
        """What a backward pass finds gradients of."""
        return [*self.vectors, *(layer.weight for layer in self.layers)]

    def step(self) -> None:
        """One update from the gradients of `leaves`, which are used up."""
        for layer in self.layers:
            layer.pull()
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._refresh()

    def values(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Go back to parameters of before."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        self._refresh()

    def state(self) -> dict[str, Any]:
        """All that going on depends on, as tensors and plain values; not copies."""
        return {
            "values": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.restore(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _refresh(self) -> None:
        for layer in self.layers:
            layer.refresh()


@contextmanager
def tunable(
    module: nn.Module, tuning: Tuning, *, steps: int, originals: Mapping[str, Tensor]
) -> Iterator[Tunable]:
    """The module with tunable layers while the context lasts, and packed ones of their last state after it.

    Args:
        module: holds packed linears; those of layouts `planes` and `low-rank` are tuned, and all vectors.
        steps: that the learning rates' schedule is made for.
        originals: weights by the linears' names in `module`; needed where codes are tuned.
    """
    tuned: dict[str, TunedLinear] = {}
    for name, found in list(module.named_modules()):
        if isinstance(found, PackedLinear):
            original = originals[name] if tuning.code_rate else None
            if (layer := _tuned(found, original)) is not None:
                tuned[name] = layer
    for name, layer in tuned.items():
        replace_module(module, name, layer)
    own = {id(parameter) for layer in tuned.values() for parameter in (*layer.changes(), layer.weight)}
    vectors = [
        parameter
        for parameter in module.parameters()
        if parameter.is_floating_point() and parameter.ndim == 1 and id(parameter) not in own
    ]
    wanted = [parameter.requires_grad for parameter in vectors]
    chosen = Tunable(list(tuned.values()), vectors, tuning, steps)
    for parameter in chosen.leaves():
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter, before in zip(vectors, wanted, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
        for name, layer in tuned.items():
            replace_module(module, name, PackedLinear.of(layer.representation(), layer.bias))


def _tuned(linear: PackedLinear, original: Tensor | None) -> TunedLinear | None:
    """None for layouts whose values stay."""
    matrix = linear.packed.unpack()
    if isinstance(matrix, Planes):
        return TunedPlanes(matrix, linear.bias, original=original, conv1d=linear.conv1d)
    if isinstance(matrix, LowRankBinary):
        return TunedLowRank(matrix, linear.bias, original=original, conv1d=linear.conv1d)
    return None
