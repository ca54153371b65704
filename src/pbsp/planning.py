"""From a config to what every linear layer is stored as: given, uniform, by block, or measured."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.allocation.coarse import coarse_plan
from pbsp.allocation.measured import Costs, measure_costs
from pbsp.allocation.plan import uniform_plan
from pbsp.allocation.planfile import plan_of
from pbsp.calibration.importance import block_cosines, outlier_ratios
from pbsp.calibration.moments import BY_GRADIENT
from pbsp.calibration.sensitivity import gradient_lengths, token_weights
from pbsp.config import AUTO, Config
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import ConfigError
from pbsp.file_size import embedding_loss, plan_of_size
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import Block
from pbsp.models.shards import shards_of
from pbsp.planned import Planned
from pbsp.pruning.pattern import Pattern
from pbsp.quantization.rows import WIDTHS
from pbsp.trial import can_try, trial_losses

MEASURED_WINDOWS = 8
"""Windows that costs are measured on, and of which a backward pass holds hidden states at a time."""

T = TypeVar("T")


class Measured:
    """What has been measured on one model and its windows, for the plans of several configs.

    A backward pass over 32 windows takes as long as all the rest of a compression; budgets that differ
    in bits alone need one.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, measure: Callable[[], T]) -> T:
        """What `measure` returned when it was first called with this key."""
        if key not in self._found:
            self._found[key] = measure()
        return self._found[key]


def check_request(blocks: list[Block], config: Config) -> None:
    """Refuse early what no text can change.

    Raises:
        ConfigError, PatternError: see `make_plan`.
    """
    if config.plan:
        plan_of(blocks, config.plan)
    elif not config.budgeted:
        uniform_plan(blocks, config.entry, strict=config.strict)


def make_plan(
    model: PreTrainedModel,
    blocks: list[Block],
    config: Config,
    tokens: Int64[Tensor, "windows context"],
    *,
    progress: Callable[[int, int], None] | None = None,
    measured: Measured | None = None,
    ranks: Ranks = ALONE,
) -> Planned:
    """What every linear layer is stored as.

    Args:
        tokens: calibration windows; only some allocations look at them.
        progress: told the steps done, and all, of those that do.
        measured: by earlier calls with the same model and windows; what this one measures is added.
        ranks: processes that share the windows; the first chooses, and the plan is the same on all.

    Raises:
        ConfigError: a budget is too small, or a plan does not fit the model.
        PatternError: patterns do not tile the rows.
        CalibrationError, ModelError: see `measure_costs`.
    """
    measured = measured or Measured()
    first = MEASURED_WINDOWS if config.budgeted else 0
    weighted = config.moment_weighting in BY_GRADIENT
    rest = tokens[first:] if weighted else tokens[:0]
    own = ranks.part(len(rest))
    groups = [group for group in rest[own.start : own.stop].split(MEASURED_WINDOWS) if len(group)]
    tries = config.budgeted and config.trial and can_try(model, ranks)
    parts = len(groups) + bool(first) + tries
    steps = [_step(progress, part, parts) for part in range(parts)]
    costs, lengths = None, []
    if config.budgeted:
        method = config.build()
        assert isinstance(method, PlaneFit), "the config has checked it"
        costs = measured.once(
            (method, config.strict),
            lambda: measure_costs(
                model, blocks, tokens[:first], method, strict=config.strict, progress=steps[0], ranks=ranks
            ),
        )
        lengths = [costs.lengths] if weighted else []
    found = [
        measured.once((first, part), partial(gradient_lengths, model, blocks, group, progress=step))
        for part, (group, step) in enumerate(zip(groups, steps[bool(first) : parts - tries], strict=True))
    ]
    lengths += [part for one in ranks.gather(found) for part in one]
    joined = _joined(lengths, tokens.numel())
    squares = config.moment_weighting == "squares"
    weights = {name: token_weights(found, squares=squares) for name, found in joined.items()}
    importances = _importances(model, blocks, config, tokens, ranks)

    def chosen(costs: Costs | None) -> Planned:
        return _chosen(model, blocks, config, costs, importances, tokens[:first], measured)

    planned = ranks.from_first(partial(chosen, costs))
    if costs and tries:
        some = tokens[: max(first, ranks.size)]
        losses = _trial(model, planned, config, some, joined, steps[-1], ranks)
        corrected = costs.corrected(planned.plan, losses)
        planned = replace(ranks.from_first(partial(chosen, corrected)), tried=corrected is not costs)
    return replace(planned, token_weights=weights)


def _trial(
    model: PreTrainedModel,
    planned: Planned,
    config: Config,
    tokens: Tensor,
    lengths: dict[str, Tensor],
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> dict[str, float]:
    """What each layer's error costs in a copy that is compressed as planned, on the first windows.

    Where tokens weigh by gradients, the copy's weigh by squares: by lengths, as layers are compressed
    later, plans were worse below two bits (docs/experiments.md).
    """
    if config.moment_weighting in BY_GRADIENT:
        weights = {name: token_weights(f[: tokens.numel()], squares=True) for name, f in lengths.items()}
        planned = replace(planned, token_weights=weights)
        config = replace(config, weighting="squares")
    return trial_losses(model, planned, config, tokens, progress=progress, ranks=ranks)


def _step(
    progress: Callable[[int, int], None] | None, part: int, parts: int
) -> Callable[[int, int], None] | None:
    """The progress of one of several equal parts."""
    return progress and (lambda done, total: progress(part * total + done, parts * total))


def _joined(lengths: list[dict[str, Tensor]], tokens: int) -> dict[str, Tensor]:
    """The gradients' squared lengths at all tokens, for linears that are called on each of them once.

    Others, as those of experts, may be called on other tokens when their moments are measured.
    """
    if not lengths:
        return {}
    joined = {
        name: torch.cat([part[name] for part in lengths])
        for name in lengths[0]
        if all(name in part for part in lengths)
    }
    return {name: found for name, found in joined.items() if len(found) == tokens}


def _importances(
    model: PreTrainedModel, blocks: list[Block], config: Config, tokens: Tensor, ranks: Ranks
) -> list[float]:
    """Of the blocks, where an allocation over them is asked for."""
    if config.plan or config.budgeted or not config.coarse:
        return []
    if config.coarse == "outliers":
        return outlier_ratios(model, blocks, tokens, ranks=ranks)
    return [1 - cosine for cosine in block_cosines(model, blocks, tokens, ranks=ranks)]


def _chosen(
    model: PreTrainedModel,
    blocks: list[Block],
    config: Config,
    costs: Costs | None,
    importances: list[float],
    tokens: Tensor,
    measured: Measured,
) -> Planned:
    bits = config.embedding_bits
    if config.plan:
        return Planned(plan_of(blocks, config.plan), bits)
    if config.budgeted:
        assert costs is not None, "they were measured"
        return _within_budget(model, config, costs, tokens, measured)
    if config.coarse:
        (pattern,) = config.patterns
        assert isinstance(pattern, Pattern), "the config has checked it"
        plan, coarse = coarse_plan(
            blocks,
            pattern,
            importances,
            rule=config.coarse,
            strict=config.strict,
            spread=config.spread,
        )
        return Planned(plan, bits, coarse)
    return Planned(uniform_plan(blocks, config.entry, strict=config.strict), bits)


def _within_budget(
    model: PreTrainedModel, config: Config, costs: Costs, tokens: Tensor, measured: Measured
) -> Planned:
    """The best plan within the budget; with the better bits of embeddings where these are open."""
    bits = config.embedding_bits
    if config.file_size is None:
        assert config.bits is not None
        plan = costs.plan(int(config.bits * costs.weights))
        return Planned(plan, bits, expected_loss=costs.expected_loss(plan))
    added = {bits: 0.0}
    if config.embeddings == AUTO and not shards_of(model):  # block by block there is no whole model to ask
        fewest = min(WIDTHS)
        added[fewest] = measured.once("embeddings", lambda: embedding_loss(model, tokens, fewest))
    found, refused = [], None
    for bits, loss in added.items():
        try:
            plan = plan_of_size(model, config, costs, bits)
        except ConfigError as error:
            refused = error
            continue
        found.append(Planned(plan, bits, expected_loss=costs.expected_loss(plan) + loss))
    if refused and not found:
        raise refused
    return min(found, key=lambda planned: planned.expected_loss or 0.0)
