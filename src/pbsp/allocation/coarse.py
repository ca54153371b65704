"""One N:M for every block, by the importance of the block: the paper's rule, and STBLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor

from pbsp.allocation.plan import Plan, block_plan, uniform_plan
from pbsp.errors import ConfigError
from pbsp.models.blocks import Block, linear_weight
from pbsp.pruning.pattern import Pattern


@dataclass(frozen=True)
class CoarseAllocation:
    """An N for every block, in the model's order.

    Attributes:
        rule: "paper" or "outliers", see `coarse_allocation`.
        importances: of the paper, 1 − mean cosine between a block's input and output hidden states;
            of outliers, the share of outlying scores.
        ranks: 1 for the most important block, up to the number of blocks.
        kept: the N of every block's N:M.
    """

    rule: str
    importances: tuple[float, ...]
    ranks: tuple[int, ...]
    kept: tuple[int, ...]


def coarse_plan(
    blocks: list[Block],
    pattern: Pattern,
    importances: Sequence[float],
    *,
    rule: str,
    strict: bool,
    spread: int | None = None,
) -> tuple[Plan, CoarseAllocation]:
    """One pattern for every linear layer, its N the higher the more important the block is.

    Args:
        blocks: all decoder blocks, in order.
        pattern: N:M on average over the weights that take it.
        importances: of the blocks, in their order.
        rule: see `coarse_allocation`.
        strict: as in `uniform_plan`.
        spread: see `coarse_allocation`.

    Raises:
        ConfigError: the spread leaves 1…M.
        PatternError: no layer can take the pattern, or, with `strict`, one layer cannot.
    """
    uniform = uniform_plan(blocks, (pattern,), strict=strict)
    sizes = [
        sum(linear_weight(module).numel() for name, module in block.linears().items() if name in distinct)
        for distinct in [uniform.entries.keys() - uniform.same_as.keys()]
        for block in blocks
    ]
    coarse = coarse_allocation(
        importances, pattern.kept, pattern.group, rule=rule, spread=spread, sizes=sizes
    )
    entries = [(replace(pattern, kept=kept),) for kept in coarse.kept]
    return block_plan(blocks, entries, strict=strict), coarse


def coarse_allocation(
    importances: Sequence[float],
    kept: int,
    group: int,
    *,
    rule: str = "paper",
    spread: int | None = None,
    sizes: Sequence[int] | None = None,
) -> CoarseAllocation:
    """N from kept + spread at the most important block to kept − spread at the least.

    Between them the rule "paper" draws a straight line by rank, "outliers" one by the importance itself,
    moved so that its mean is `kept`. The line is rounded half up, which can come out above or below
    `kept` on average. Then the least important of the blocks that were rounded up are lowered until the
    average, weighted by size, is not above `kept`; "outliers" also raises the most important ones, those
    that were rounded down first, as long as it stays so. N never rises from a block to a less important
    one, and of equally important blocks the earlier ranks higher.

    Args:
        importances: of the blocks, in their order.
        kept: the average N; all blocks' N if there is only one block.
        group: M.
        rule: "paper" or "outliers".
        spread: 1 by default, or 0 if N − 1 or N + 1 leaves 1…M.
        sizes: the weights of every block; by default all alike.

    Raises:
        ConfigError: the spread leaves 1…M.

    Source: the paper's coarse-grained stage; it gives no spread, which is our choice. STBLLM
    (arXiv 2408.01803), layer-wise assignment by outlier ratios.
    """
    if spread is None:
        spread = min(1, kept - 1, group - kept)
    if not 0 <= spread <= min(kept - 1, group - kept):
        raise ConfigError(
            f"a spread of {spread} around {kept}:{group} leaves 1:{group} to {group}:{group}; "
            f"choose at most {min(kept - 1, group - kept)}"
        )
    order = sorted(range(len(importances)), key=lambda block: -importances[block])
    ordered_sizes = [1 if sizes is None else sizes[block] for block in order]
    if rule == "paper":
        line = _line_by_rank(kept, spread, len(order))
    else:
        line = _line_by_value(kept, spread, [importances[block] for block in order])
    ranked = _balanced(line, kept, spread, ordered_sizes, fill=rule == "outliers")
    ranks, chosen = [0] * len(order), [0] * len(order)
    for position, block in enumerate(order):
        ranks[block] = position + 1
        chosen[block] = ranked[position]
    return CoarseAllocation(rule, tuple(importances), tuple(ranks), tuple(chosen))


def _line_by_rank(kept: int, spread: int, count: int) -> list[Fraction]:
    if count < 2:
        return [Fraction(kept)] * count
    return [kept + spread - Fraction(2 * spread * position, count - 1) for position in range(count)]


def _line_by_value(kept: int, spread: int, falling: Sequence[float]) -> list[Fraction]:
    span = Fraction(falling[0]) - Fraction(falling[-1])
    if span == 0:
        return [Fraction(kept)] * len(falling)
    steps = [2 * spread * (Fraction(value) - Fraction(falling[-1])) / span for value in falling]
    shift = kept - sum(steps, Fraction(0)) / len(steps)
    return [min(max(step + shift, Fraction(kept - spread)), Fraction(kept + spread)) for step in steps]


def _balanced(line: list[Fraction], kept: int, spread: int, sizes: list[int], *, fill: bool) -> list[int]:
    """The falling line in whole numbers, its mean by size not above `kept`; with `fill` hardly below."""
    whole = [floor(value + Fraction(1, 2)) for value in line]
    excess = sum(size * (value - kept) for size, value in zip(sizes, whole, strict=True))
    positions = range(len(line))
    candidates = [position for position in positions if whole[position] > line[position]]
    while excess > 0:
        for position in reversed(candidates):
            if excess > 0 and whole[position] > kept - spread:
                whole[position] -= 1
                excess -= sizes[position]
        candidates = list(positions)  # only where the important blocks are the large ones
    while fill:
        free = [
            position
            for position in positions
            if whole[position] < (whole[position - 1] if position else kept + spread)
            and excess + sizes[position] <= 0
        ]
        if not free:
            break
        position = next((position for position in free if whole[position] < line[position]), free[0])
        whole[position] += 1
        excess += sizes[position]
    return whole
