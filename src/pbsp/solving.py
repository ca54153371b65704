"""Solving the linear layers of one block: which rows go together, and how far off the results are."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.allocation.entry import Entry
from pbsp.allocation.plan import Plan
from pbsp.calibration.moments import InputMoment, MomentPart
from pbsp.config import Config
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.models.blocks import linear_weight
from pbsp.storage.layouts import Representation, join

_Key = tuple[int, Entry, str]
"""Rows with the same one are solved as one matrix: their moment, their entry, a name if they stay apart."""


def solve_linears(
    linears: dict[str, nn.Module],
    moments: dict[str, InputMoment],
    plan: Plan,
    config: Config,
    *,
    ranks: Ranks = ALONE,
) -> dict[str, tuple[Representation, float]]:
    """Each linear's representation and relative output error, in the order given.

    Rows with one moment and one entry are solved as one matrix, unless the method looks at a
    linear as a whole.

    Args:
        linears: of one block, by full name; those that share an earlier one's weight are left out.
        moments: of their inputs; each is taken out when it is used, as 32 heads' of 4096 features are 2.1 GB.
        ranks: processes that share the work, and all get the results.

    Raises:
        CalibrationError: a linear has no moment or cannot be solved; names it.
    """
    weights = {name: linear_weight(module) for name, module in linears.items() if name not in plan.same_as}
    for name in weights:
        if name not in moments:
            raise CalibrationError(f"{name} is never called on the calibration text; it cannot be solved")
    keys = {name: _keys(name, moments[name], plan, config) for name in weights}
    tasks = _tasks(keys)

    def solve(task: int) -> dict[str, tuple[Representation, float]]:
        own = {name: moments.pop(name) for name in tasks[task]}
        # In float32 only now: of a block of 7B's shapes that is 0.8 GB, of its widest task 0.4.
        targets = {name: weights[name].float() for name in own}
        return _solve_together(own, keys, targets, plan, config)

    costs = [sum(_cost(weights[name], len(keys[name])) for name in task) for task in tasks]
    found = {name: result for results in ranks.spread(costs, solve) for name, result in results.items()}
    return {name: found[name] for name in weights}


def _keys(name: str, moment: InputMoment, plan: Plan, config: Config) -> list[_Key]:
    """One for each part of the linear's rows."""
    entry = plan.entries[name]
    apart = name if config.build(entry).rows_interact else ""
    return [(id(part.moment), entry, apart) for part in moment.parts]


def _tasks(keys: dict[str, list[_Key]]) -> list[list[str]]:
    """Linears that have rows to be solved with each other's, in the order given."""
    tasks: list[tuple[set[_Key], list[str]]] = []
    for name, own in keys.items():
        joined: tuple[set[_Key], list[str]] = (set(own), [name])
        apart = []
        for task in tasks:
            if task[0].isdisjoint(own):
                apart.append(task)
            else:
                joined = (task[0] | joined[0], task[1] + joined[1])
        tasks = [*apart, joined]
    place = {name: index for index, name in enumerate(keys)}
    ordered = [sorted(names, key=place.__getitem__) for _, names in tasks]
    return sorted(ordered, key=lambda names: place[names[0]])


def _cost(weight: Float[Tensor, "out in"], parts: int) -> int:
    """About how long a linear takes: inverting a moment was seen to take as long as columns²/16384 rows."""
    rows, columns = weight.shape
    return columns * (rows + parts * columns**2 // 16_384)


def _solve_together(
    moments: dict[str, InputMoment],
    keys: dict[str, list[_Key]],
    weights: dict[str, Tensor],
    plan: Plan,
    config: Config,
) -> dict[str, tuple[Representation, float]]:
    """The linears that the moments are of."""
    groups: dict[_Key, list[tuple[str, MomentPart]]] = {}
    for name, moment in moments.items():
        for key, part in zip(keys[name], moment.parts, strict=True):
            groups.setdefault(key, []).append((name, part))
    pieces: dict[str, list[tuple[int, Representation]]] = {name: [] for name in moments}
    for group in groups.values():
        rows = [weights[name][part.rows.start : part.rows.stop] for name, part in group]
        method = config.build(plan.entries[group[0][0]])
        try:
            whole = method.compress(torch.cat(rows), group[0][1].moment)
        except CalibrationError as error:
            names = ", ".join(dict.fromkeys(name for name, _ in group))
            raise CalibrationError(f"{names}: {error}") from None
        for (name, part), piece in zip(group, whole.split([len(row) for row in rows]), strict=True):
            pieces[name].append((part.rows.start, piece))
    results: dict[str, tuple[Representation, float]] = {}
    for name, moment in moments.items():
        representation = join([piece for _, piece in sorted(pieces[name], key=lambda item: item[0])])
        signal = moment.error(weights[name])
        error = moment.error(weights[name] - representation.dense()) / signal if signal > 0 else 0.0
        results[name] = representation, error
    return results
