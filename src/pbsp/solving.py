"""Solving the linear layers of one block: which rows go together, and how far off the results are."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pbsp.allocation.plan import Plan
from pbsp.calibration.moments import InputMoment, MomentPart
from pbsp.config import Config
from pbsp.errors import CalibrationError
from pbsp.models.blocks import linear_weight
from pbsp.pruning.pattern import Pattern
from pbsp.storage.layouts import Representation, join


def solve_linears(
    linears: dict[str, nn.Module], moments: dict[str, InputMoment], plan: Plan, config: Config
) -> dict[str, tuple[Representation, float]]:
    """Each linear's representation and relative output error, in the order given.

    Rows with one moment and one set of planes are solved as one matrix, unless the method looks at a
    linear as a whole.

    Args:
        linears: of one block, by full name; those that share an earlier one's weight are left out.
        moments: of their inputs; each is taken out once it is used, as 32 heads' of 4096 features are 2.1 GB.

    Raises:
        CalibrationError: a linear has no moment or cannot be solved; names it.
    """
    weights: dict[str, Tensor] = {}
    groups: OrderedDict[tuple[int, tuple[Pattern, ...], str], list[tuple[str, MomentPart]]] = OrderedDict()
    for name, module in linears.items():
        if name in plan.same_as:
            continue
        if name not in moments:
            raise CalibrationError(f"{name} is never called on the calibration text; it cannot be solved")
        weights[name] = linear_weight(module).float()
        apart = name if config.build(plan.patterns[name]).rows_interact else ""
        for part in moments[name].parts:
            key = id(part.moment), plan.patterns[name], apart
            groups.setdefault(key, []).append((name, part))
    pieces: dict[str, list[tuple[int, Representation]]] = {name: [] for name in weights}
    results: dict[str, tuple[Representation, float]] = {}
    while groups:
        (_, patterns, _), members = groups.popitem(last=False)
        rows = [weights[name][part.rows.start : part.rows.stop] for name, part in members]
        try:
            whole = config.build(patterns).compress(torch.cat(rows), members[0][1].moment)
        except CalibrationError as error:
            names = ", ".join(dict.fromkeys(name for name, _ in members))
            raise CalibrationError(f"{names}: {error}") from None
        for (name, part), piece in zip(members, whole.split([len(row) for row in rows]), strict=True):
            pieces[name].append((part.rows.start, piece))
            if len(pieces[name]) == len(moments[name].parts):
                results[name] = _joined(pieces.pop(name), weights[name], moments.pop(name))
    return {name: results[name] for name in weights}


def _joined(
    pieces: list[tuple[int, Representation]], weight: Tensor, moment: InputMoment
) -> tuple[Representation, float]:
    """A linear's representation from those of its rows, and its relative output error."""
    representation = join([piece for _, piece in sorted(pieces, key=lambda item: item[0])])
    signal = moment.error(weight)
    error = moment.error(weight - representation.dense()) / signal if signal > 0 else 0.0
    return representation, error
