"""Moments of the inputs of linear layers: the mean of x xᵀ over calibration tokens, the S of method.md."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.calibration.attention import QUERY_ROWS, ValueMoments
from pbsp.calibration.moment import Moment, moments_over_ranks
from pbsp.calibration.walk import Walk
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.models.blocks import Block, linear_weight

Weighting = Literal["plain", "attention", "gradient", "squares"]
"""How tokens count in moments: all alike; in a value projection's as the attention mixes them; or likewise
there, and in the others' by the length of the gradient of the model's loss at the layer's output; or in all
of them by its squared length."""
VALUES_MIXED: tuple[Weighting, ...] = ("attention", "gradient")
BY_GRADIENT: tuple[Weighting, ...] = ("gradient", "squares")


def collect_moments(
    linears: dict[str, nn.Module],
    run: Callable[[], object],
    *,
    weights: Mapping[str, Float[Tensor, "tokens"]] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """The input moment of every linear that `run` calls, by name, in the order of the first calls.

    Linears that are handed the same tensor (q, k and v; gate and up) share one moment object, so
    what is derived from it can be shared too. A linear that is never called has no entry.

    Args:
        weights: of all tokens that the linear will be called on, in their order; where a linear has none,
            they count alike.
        ranks: processes that each `run` a part of the windows; the moments are those of all.

    Raises:
        CalibrationError: a moment is not finite; names the layer.
    """
    moments: dict[str, Moment] = {}
    weights = weights or {}
    previous: list[tuple[Tensor, Moment]] = []  # the last input seen, kept alive so that `is` is sound

    def hook(name: str) -> Callable:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in weights:
                moments.setdefault(name, Moment()).update(args[0], weights[name])
                return
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
    moments = moments_over_ranks(moments, linears, ranks)
    apart = {id(moment): moment for moment in moments.values()}
    means = {key: moment.mean() for key, moment in apart.items()}
    for name, moment in moments.items():
        if not bool(torch.isfinite(means[id(moment)]).all()):
            raise CalibrationError(f"{name}: its inputs are NaN or infinite on the calibration text")
    return {name: means[id(moment)] for name, moment in moments.items()}


@dataclass(frozen=True)
class MomentPart:
    """The moment that some consecutive output rows of a linear layer are fitted with."""

    rows: range
    moment: Float[Tensor, "in in"]


@dataclass(frozen=True)
class InputMoment:
    """What a linear layer is fitted with: parts that cover its output rows, in order.

    One part is the rule. A value projection weighted by attention has one for every kv head; where
    one layer makes queries, keys and values, its other rows keep one of their own. Equal moments are
    one object, here and between layers.
    """

    parts: tuple[MomentPart, ...]

    def error(self, difference: Float[Tensor, "out in"]) -> float:
        """Σ over rows of dᵀ S d: the mean squared change of the output by this change of the weight."""
        changes = [(difference[part.rows.start : part.rows.stop].float(), part.moment) for part in self.parts]
        return sum(float(((change @ moment) * change).sum()) for change, moment in changes)


@dataclass(frozen=True)
class BlockMoments:
    """The moments of one block.

    Attributes:
        inputs: linear layer → its moment, in the order of the first calls.
        plain_because: attention that values were to be weighted by and were not → why.
    """

    inputs: dict[str, InputMoment]
    plain_because: dict[str, str]


def collect_block_moments(
    walk: Walk,
    index: int,
    block: Block,
    linears: dict[str, nn.Module],
    *,
    weighting: Weighting = "plain",
    weights: Mapping[str, Float[Tensor, "tokens"]] | None = None,
    keep: bool,
    query_rows: int = QUERY_ROWS,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> BlockMoments:
    """Run block `index` of the walk on all windows and gather the moments of `linears`, named in full.

    All weightings see the same run, by the model's own attention function: the hidden states that are
    kept do not depend on the choice.

    Args:
        walk: stands before the block.
        index: the block's.
        block: its linear layers are still dense.
        linears: of the block; others get no moment.
        weighting: of the tokens; for a value projection's see `calibration.attention`.
        weights: by gradient, see `collect_moments`; they come from the whole model, by `gradient_lengths`.
        keep: the outputs become the next block's inputs.
        query_rows: see `ValueMoments`.
        seed: of the choice of query rows.
        ranks: processes whose walks have the windows of all in parts, in order; the moments are those of all.

    Raises:
        CalibrationError: a moment is not finite; names the layer.
    """
    before = sum(ranks.gather(len(walk.hidden))[: ranks.rank])  # windows of earlier ranks
    tokens = before * walk.hidden[0].shape[1]
    chosen = weights if weighting in BY_GRADIENT and weights else {}
    mixed = weighting in VALUES_MIXED
    chosen = {name: found[tokens:] for name, found in chosen.items()}
    values = ValueMoments(block, query_rows=query_rows, seed=seed, skipped=before)
    with values.watching() if mixed else nullcontext():
        run = lambda: walk.run(index, block.module, keep=keep)  # noqa: E731
        whole = collect_moments(linears, run, weights=chosen, ranks=ranks)
    inputs = {name: _whole(linears[name], moment) for name, moment in whole.items()}
    if not mixed:
        return BlockMoments(inputs, {})
    values.add_ranks(ranks)
    if values.reason or values.heads is None:
        name = values.heads.name if values.heads else values.watched
        return BlockMoments(inputs, {name: values.reason})
    name = values.heads.name
    if name in inputs:
        means = values.means()
        if not all(bool(torch.isfinite(mean).all()) for mean in means):
            raise CalibrationError(f"{name}: its attention is NaN or infinite on the calibration text")
        inputs[name] = _with_heads(inputs[name], values.heads.rows, means)
    return BlockMoments(inputs, {})


def _whole(module: nn.Module, moment: Tensor) -> InputMoment:
    return InputMoment((MomentPart(range(len(linear_weight(module))), moment),))


def _with_heads(inputs: InputMoment, heads: tuple[range, ...], moments: list[Tensor]) -> InputMoment:
    """The rows of each head with its own moment, and the rows between them with the layer's."""
    (whole,) = inputs.parts
    parts: list[MomentPart] = []
    done = 0
    for rows, moment in zip(heads, moments, strict=True):
        if rows.start > done:
            parts.append(MomentPart(range(done, rows.start), whole.moment))
        parts.append(MomentPart(rows, moment))
        done = rows.stop
    if done < len(whole.rows):
        parts.append(MomentPart(range(done, len(whole.rows)), whole.moment))
    return InputMoment(tuple(parts))
