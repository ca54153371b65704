"""Solving the linear layers of one block: which rows go together, and how far off the results are."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.allocation.plan import Plan
from pbsp.calibration.moments import InputMoment, MomentPart
from pbsp.config import Config
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.models.blocks import linear_weight
from pbsp.pruning.pattern import Pattern
from pbsp.storage.layouts import Representation, join

_Group = list[tuple[str, MomentPart]]


def solve_linears(
    linears: dict[str, nn.Module],
    moments: dict[str, InputMoment],
    plan: Plan,
    config: Config,
    *,
    ranks: Ranks = ALONE,
) -> dict[str, tuple[Representation, float]]:
    """Each linear's representation and relative output error, in the order given.

    Rows with one moment and one set of planes are solved as one matrix, unless the method looks at a
    linear as a whole.

    Args:
        linears: of one block, by full name; those that share an earlier one's weight are left out.
        moments: of their inputs.
        ranks: processes that share the work, and all get the results.

    Raises:
        CalibrationError: a linear has no moment or cannot be solved; names it.
    """
    weights = {
        name: linear_weight(module).float() for name, module in linears.items() if name not in plan.same_as
    }
    groups = _groups(weights, moments, plan, config)
    costs = [_cost(sum(len(part.rows) for _, part in group), weights[group[0][0]]) for group in groups]
    solved = ranks.spread(costs, lambda task: _solved(groups[task], weights, plan, config))
    pieces: dict[str, list[tuple[int, Representation]]] = {name: [] for name in weights}
    for group, parts in zip(groups, solved, strict=True):
        for (name, part), piece in zip(group, parts, strict=True):
            pieces[name].append((part.rows.start, piece))
    names = list(weights)
    results = [join([piece for _, piece in sorted(pieces[name], key=lambda item: item[0])]) for name in names]

    def error(task: int) -> float:
        weight, moment = weights[names[task]], moments[names[task]]
        signal = moment.error(weight)
        return moment.error(weight - results[task].dense()) / signal if signal > 0 else 0.0

    errors = ranks.spread([weight.numel() for weight in weights.values()], error)
    return dict(zip(names, zip(results, errors, strict=True), strict=True))


def _groups(
    weights: dict[str, Tensor], moments: dict[str, InputMoment], plan: Plan, config: Config
) -> list[_Group]:
    """The rows that are solved together, in the same order in every process."""
    groups: dict[tuple[int, tuple[Pattern, ...], str], _Group] = {}
    for name in weights:
        if name not in moments:
            raise CalibrationError(f"{name} is never called on the calibration text; it cannot be solved")
        apart = name if config.build(plan.patterns[name]).rows_interact else ""
        for part in moments[name].parts:
            key = id(part.moment), plan.patterns[name], apart
            groups.setdefault(key, []).append((name, part))
    return list(groups.values())


def _cost(rows: int, weight: Float[Tensor, "out in"]) -> int:
    """About how long the rows take: inverting the moment was seen to take as long as columns²/16384 rows."""
    columns = weight.shape[1]
    return columns * (rows + columns**2 // 16_384)


def _solved(group: _Group, weights: dict[str, Tensor], plan: Plan, config: Config) -> list[Representation]:
    """The parts of the group, one by one."""
    rows = [weights[name][part.rows.start : part.rows.stop] for name, part in group]
    method = config.build(plan.patterns[group[0][0]])
    try:
        whole = method.compress(torch.cat(rows), group[0][1].moment)
    except CalibrationError as error:
        names = ", ".join(dict.fromkeys(name for name, _ in group))
        raise CalibrationError(f"{names}: {error}") from None
    return [*whole.split([len(row) for row in rows])]
