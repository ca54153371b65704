"""Moments of the inputs of linear layers: the mean of x xᵀ over calibration tokens, the S of method.md."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.calibration.attention import QUERY_ROWS, ValueMoments
from pbsp.calibration.walk import Walk
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.models.blocks import Block, linear_weight

Weighting = Literal["plain", "attention", "gradient"]
"""How tokens count in moments: all alike; in a value projection's as the attention mixes them; or by the
squared gradient of the model's loss at the layer's output."""


class Moment:
    """A streaming mean of x xᵀ, summed in float32 as (in, in), in squared activation units."""

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | None = None

    def update(
        self, inputs: Float[Tensor, "*tokens in"], weights: Float[Tensor, "all"] | None = None
    ) -> None:
        """Add every token's outer product, times its weight.

        Args:
            weights: of all tokens of the layer, in the order in which they come; by default 1.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self._total is None:
            self._total = rows.new_zeros(rows.shape[1], rows.shape[1])
        weighted = rows
        if weights is not None:
            chosen = weights[self.tokens : self.tokens + len(rows)].to(rows.device)
            weighted = rows * chosen[:, None]
        self._total.addmm_(weighted.T, rows)
        self.tokens += len(rows)

    def copy(self) -> "Moment":
        """One with the same sum, which what is added to this one does not change."""
        copied = Moment()
        copied.tokens, copied._total = self.tokens, None if self._total is None else self._total.clone()
        return copied

    def add_ranks(self, ranks: Ranks, *, tokens: int, zero: Callable[[], Float[Tensor, "in in"]]) -> None:
        """Make this the sum over all ranks, which call it together.

        Args:
            ranks: the processes that each have a part of the tokens.
            tokens: that all of them have.
            zero: makes the sum of a rank that has none.
        """
        self._total = ranks.add(zero() if self._total is None else self._total)
        self.tokens = tokens

    def mean(self) -> Float[Tensor, "in in"]:
        """Σ x xᵀ / tokens, symmetric."""
        assert self._total is not None
        return self._total / self.tokens


def collect_moments(
    linears: dict[str, nn.Module],
    run: Callable[[], None],
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
    moments = _over_ranks(moments, linears, ranks)
    means = {id(moment): moment.mean() for moment in moments.values()}
    for name, moment in moments.items():
        if not bool(torch.isfinite(means[id(moment)]).all()):
            raise CalibrationError(f"{name}: its inputs are NaN or infinite on the calibration text")
    return {name: means[id(moment)] for name, moment in moments.items()}


def _over_ranks(moments: dict[str, Moment], linears: dict[str, nn.Module], ranks: Ranks) -> dict[str, Moment]:
    """The sums over all ranks, the same objects for the same linears on all of them.

    A linear may be called on some ranks only, as an expert is. Linears share a moment if every rank says so.
    """
    found = ranks.gather({name: (id(moment), moment.tokens) for name, moment in moments.items()})
    names = dict.fromkeys(name for one in found for name in one)
    sharing = {name: tuple(one.get(name, (None, 0))[0] for one in found) for name in names}
    sharers: dict[int, tuple[int | None, ...]] = {}
    for name, moment in moments.items():
        if sharers.setdefault(id(moment), sharing[name]) != sharing[name]:
            moments[name] = moment.copy()
    merged: dict[tuple[int | None, ...], Moment] = {}
    for name in names:
        if sharing[name] in merged:
            continue
        merged[sharing[name]] = moments.get(name, Moment())
        merged[sharing[name]].add_ranks(
            ranks,
            tokens=sum(one[name][1] for one in found if name in one),
            zero=partial(_no_sum, linears[name]),
        )
    return {name: merged[sharing[name]] for name in names}


def _no_sum(linear: nn.Module) -> Float[Tensor, "in in"]:
    weight = linear_weight(linear)
    return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)


@dataclass(frozen=True)
class MomentPart:
    """The moment that some consecutive output rows of a linear layer are fitted with."""

    rows: range
    moment: Float[Tensor, "in in"]


@dataclass(frozen=True)
class InputMoment:
    """What a linear layer is fitted with: parts that cover its output rows, in order.

    One part is the rule. A value projection weighted by attention has one for every kv head; where
    one layer makes queries, keys and values, its other rows keep the plain moment. Equal moments are
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
        plain_because: attention that was to be weighted and was not → why its values have plain moments.
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

    Both weightings see the same run, by the model's own attention function: plain moments and the
    hidden states that are kept do not depend on the choice.

    Args:
        walk: stands before the block.
        index: the block's.
        block: its linear layers are still dense.
        linears: of the block; others get no moment.
        weighting: of the tokens; for a value projection's see `calibration.attention`.
        weights: of "gradient", see `collect_moments`.
        keep: the outputs become the next block's inputs.
        query_rows: see `ValueMoments`.
        seed: of the choice of query rows.
        ranks: processes whose walks have the windows of all in parts, in order; the moments are those of all.

    Raises:
        CalibrationError: a moment is not finite; names the layer.
    """
    before = sum(ranks.gather(len(walk.hidden))[: ranks.rank])  # windows of earlier ranks
    if weighting != "attention":
        chosen = weights if weighting == "gradient" and weights else {}
        tokens = before * walk.hidden[0].shape[1]
        chosen = {name: found[tokens:] for name, found in chosen.items()}
        run = lambda: walk.run(index, block.module, keep=keep)  # noqa: E731
        plain = collect_moments(linears, run, weights=chosen, ranks=ranks)
        return BlockMoments({name: _plain(linears[name], moment) for name, moment in plain.items()}, {})
    values = ValueMoments(block, query_rows=query_rows, seed=seed, skipped=before)
    with values.watching():
        plain = collect_moments(linears, lambda: walk.run(index, block.module, keep=keep), ranks=ranks)
    values.add_ranks(ranks)
    inputs = {name: _plain(linears[name], moment) for name, moment in plain.items()}
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


def _plain(module: nn.Module, moment: Tensor) -> InputMoment:
    return InputMoment((MomentPart(range(len(linear_weight(module))), moment),))


def _with_heads(plain: InputMoment, heads: tuple[range, ...], moments: list[Tensor]) -> InputMoment:
    """The rows of each head with its own moment, and the rows between them with the plain one."""
    (whole,) = plain.parts
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
