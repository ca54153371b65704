"""What stands in for the moments of experts that are given no tokens, or hardly any, while a block is run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pbsp.calibration.moments import InputMoment, MomentPart, collect_moments
from pbsp.distributed import ALONE, Ranks
from pbsp.models.blocks import Block, is_listed, linear_weight
from pbsp.models.experts import ExpertLinears

_LEAST_TOKENS = 1 / 16  # of an expert's input features; a choice, not measured
_ROWS = 4096  # of a layer's tokens, kept for experts that turn out to have too few


@dataclass(frozen=True)
class StandIns:
    """Moments that no calibration of a linear's own gave.

    Attributes:
        inputs: linear layer → moment.
        reasons: the same layers → why, and on what they are solved instead.
    """

    inputs: dict[str, InputMoment] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class ExpertInputs:
    """The tokens that the experts of a block are given while its windows run inside `watching`.

    Args:
        block: before it is compressed.
        windows: that will be run, by all processes together; some tokens of each are kept.
    """

    def __init__(self, block: Block, *, windows: int) -> None:
        self._block = block
        self._rows = max(1, _ROWS // windows)
        self._tokens: dict[str, Tensor] = {}  # of each expert, by the name of the module that holds them
        self._sample: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count each expert's tokens until the end of the context."""
        with ExitStack() as hooks:
            for name, module in self._experts().items():
                hooks.enter_context(module.register_forward_pre_hook(self._hook(name)))
            yield

    def stand_ins(
        self, linears: dict[str, nn.Module], moments: dict[str, InputMoment], *, ranks: Ranks = ALONE
    ) -> StandIns:
        """For those of `linears` whose expert had too few tokens for a moment of its own.

        An expert of a known kind is run on a sample of all the tokens that its layer got. Of others, whose
        own tokens cannot be told, one that was never called gets the identity: every weight counts alike.

        Args:
            linears: by their names in full.
            moments: their own, where they were called.
            ranks: processes that have each run a part of the windows, in order.

        Raises:
            CalibrationError: a moment is not finite; names the layer.
        """
        found = StandIns()
        for name, module in self._experts().items():
            if name not in self._tokens:
                continue
            counts = ranks.add(self._tokens[name].clone())
            sample: Tensor | None = None
            for expert, tokens in enumerate(counts.tolist()):
                inside = {key: linears[key] for key in linears if key.startswith(f"{name}.{expert}.")}
                features = min((linear_weight(linear).shape[1] for linear in inside.values()), default=0)
                if tokens >= features * _LEAST_TOKENS:
                    continue
                if sample is None:
                    sample = torch.cat([rows for one in ranks.gather(self._sample[name]) for rows in one])
                got = f"its expert got {tokens} of {int(counts.sum())} places of tokens"
                reason = f"{got}; solved on {len(sample)} tokens of its whole layer instead"
                own = collect_moments(inside, partial(_run, module, expert, sample))
                for key, moment in own.items():
                    _add(found, key, inside[key], moment, reason)
        for name, linear in linears.items():
            if name not in moments and name not in found.inputs and is_listed(self._block, name):
                eye = torch.eye(linear_weight(linear).shape[1], device=linear_weight(linear).device)
                _add(found, name, linear, eye, "never called on the calibration text; solved without it")
        return found

    def _experts(self) -> dict[str, ExpertLinears]:
        return {
            f"{self._block.name}.{name}": module
            for name, module in self._block.module.named_modules()
            if isinstance(module, ExpertLinears)
        }

    def _hook(self, name: str) -> Callable[..., None]:
        def before(module: ExpertLinears, args: tuple[Any, ...]) -> None:
            hidden, chosen = args[:2]
            tokens = torch.bincount(chosen.flatten().clamp_max(len(module)), minlength=len(module) + 1)
            self._tokens[name] = self._tokens.get(name, 0) + tokens[:-1]
            step = -(-len(hidden) // self._rows)
            self._sample.setdefault(name, []).append(hidden[::step].detach().clone())

        return before


def _run(module: ExpertLinears, expert: int, rows: Tensor) -> None:
    module.output(expert, rows)


def _add(found: StandIns, name: str, linear: nn.Module, moment: Tensor, reason: str) -> None:
    found.inputs[name] = InputMoment((MomentPart(range(len(linear_weight(linear))), moment),))
    found.reasons[name] = reason
