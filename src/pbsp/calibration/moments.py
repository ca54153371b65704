"""Moments of the inputs of linear layers: the mean of x xᵀ over calibration tokens, the S of method.md."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.errors import CalibrationError


class Moment:
    """A streaming mean of x xᵀ, summed in float32 as (in, in), in squared activation units."""

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | None = None

    def update(self, inputs: Float[Tensor, "*tokens in"]) -> None:
        """Add every token's outer product."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self._total is None:
            self._total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._total.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def mean(self) -> Float[Tensor, "in in"]:
        """Σ x xᵀ / tokens, symmetric."""
        assert self._total is not None
        return self._total / self.tokens


def collect_moments(linears: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    """The input moment of every linear that `run` calls, by name, in the order of the first calls.

    Linears that are handed the same tensor (q, k and v; gate and up) share one moment object, so
    what is derived from it can be shared too. A linear that is never called has no entry.

    Raises:
        CalibrationError: a moment is not finite; names the layer.
    """
    moments: dict[str, Moment] = {}
    previous: list[tuple[Tensor, Moment]] = []  # the last input seen, kept alive so that `is` is sound

    def hook(name: str) -> Callable:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if previous and previous[0][0] is args[0] and moments.get(name, previous[0][1]) is previous[0][1]:
                moments[name] = previous[0][1]
                return
            moment = moments.setdefault(name, Moment())
            moment.update(args[0])
            previous[:] = [(args[0], moment)]

        return before

    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.enter_context(module.register_forward_pre_hook(hook(name)))
        run()
    means = {id(moment): moment.mean() for moment in moments.values()}
    for name, moment in moments.items():
        if not bool(torch.isfinite(means[id(moment)]).all()):
            raise CalibrationError(f"{name}: its inputs are NaN or infinite on the calibration text")
    return {name: means[id(moment)] for name, moment in moments.items()}
