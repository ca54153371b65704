"""Which planes each linear layer gets: the same everywhere, or by the paper's ranking of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pbsp.errors import ConfigError, PatternError
from pbsp.models.blocks import Block, linear_weight
from pbsp.pruning.pattern import Pattern, format_patterns


@dataclass(frozen=True)
class Plan:
    """What is done with every linear layer of the decoder blocks, in order.

    Attributes:
        patterns: linear layer → its planes.
        left_uncompressed: linear layer that stays as it is → reason.
        same_as: linear layer → an earlier one with the same weight tensor, whose planes it takes.
    """

    patterns: dict[str, tuple[Pattern, ...]]
    left_uncompressed: dict[str, str]
    same_as: dict[str, str]


@dataclass(frozen=True)
class CoarseAllocation:
    """The paper's coarse stage, block by block in the model's order.

    Attributes:
        importances: 1 − mean cosine between a block's input and output hidden states.
        ranks: 1 for the most important block, up to the number of blocks.
        kept: the N of every block's N:M.
    """

    importances: tuple[float, ...]
    ranks: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def cosines(self) -> tuple[float, ...]:
        """The mean cosines that the importances come from."""
        return tuple(1 - importance for importance in self.importances)


def uniform_plan(blocks: list[Block], patterns: tuple[Pattern, ...], *, strict: bool) -> Plan:
    """The same planes for every linear layer whose rows they tile.

    Raises:
        PatternError: no layer can take the patterns, or, with `strict`, one layer cannot.
    """
    return _plan(blocks, [patterns] * len(blocks), strict=strict)


def paper_plan(
    blocks: list[Block],
    pattern: Pattern,
    importances: Sequence[float],
    *,
    strict: bool,
    spread: int | None = None,
) -> tuple[Plan, CoarseAllocation]:
    """One plane for every linear layer, its N the higher the more important the block is.

    Args:
        blocks: all decoder blocks, in order.
        pattern: N:M on average over the weights that take it.
        importances: of the blocks, in their order.
        strict: as in `uniform_plan`.
        spread: see `coarse_allocation`.

    Raises:
        ConfigError: the spread leaves 1…M.
        PatternError: no layer can take the pattern, or, with `strict`, one layer cannot.
    """
    uniform = uniform_plan(blocks, (pattern,), strict=strict)
    sizes = [
        sum(linear_weight(module).numel() for name, module in block.linears().items() if name in distinct)
        for distinct in [uniform.patterns.keys() - uniform.same_as.keys()]
        for block in blocks
    ]
    coarse = coarse_allocation(importances, pattern.kept, pattern.group, spread=spread, sizes=sizes)
    patterns = [(replace(pattern, kept=kept),) for kept in coarse.kept]
    return _plan(blocks, patterns, strict=strict), coarse


def coarse_allocation(
    importances: Sequence[float],
    kept: int,
    group: int,
    *,
    spread: int | None = None,
    sizes: Sequence[int] | None = None,
) -> CoarseAllocation:
    """N falls from kept + spread at the most important block to kept − spread at the least, by rank.

    The straight line is rounded half up, so it can come out above `kept` on average. Then the least
    important of the blocks that were rounded up are lowered, until the average, weighted by size, is not
    above `kept`. Among blocks of equal importance the earlier one ranks as the more important.

    Args:
        importances: of the blocks, in their order.
        kept: the average N; all blocks' N if there is only one block.
        group: M.
        spread: 1 by default, or 0 if N − 1 or N + 1 leaves 1…M.
        sizes: the weights of every block; by default all alike.

    Raises:
        ConfigError: the spread leaves 1…M.

    Source: the paper's coarse-grained stage; it gives no spread, which is our choice.
    """
    if spread is None:
        spread = min(1, kept - 1, group - kept)
    if not 0 <= spread <= min(kept - 1, group - kept):
        raise ConfigError(
            f"a spread of {spread} around {kept}:{group} leaves 1:{group} to {group}:{group}; "
            f"choose at most {min(kept - 1, group - kept)}"
        )
    order = sorted(range(len(importances)), key=lambda block: -importances[block])
    ranked = _balanced_line(kept, spread, [1 if sizes is None else sizes[block] for block in order])
    ranks, chosen = [0] * len(order), [0] * len(order)
    for position, block in enumerate(order):
        ranks[block] = position + 1
        chosen[block] = ranked[position]
    return CoarseAllocation(tuple(importances), tuple(ranks), tuple(chosen))


def _balanced_line(kept: int, spread: int, sizes: list[int]) -> list[int]:
    """N by rank, in integers, so that half-way values are exact: 2·steps times the line is whole."""
    steps = len(sizes) - 1
    if steps < 1:
        return [kept] * len(sizes)
    doubled = [2 * ((kept + spread) * steps - 2 * spread * position) for position in range(len(sizes))]
    line = [(value + steps) // (2 * steps) for value in doubled]
    rounded_up = [
        position for position in range(len(sizes)) if 2 * steps * line[position] > doubled[position]
    ]
    excess = sum(size * (value - kept) for size, value in zip(sizes, line, strict=True))
    candidates = rounded_up
    while excess > 0:
        for position in reversed(candidates):
            if excess > 0 and line[position] > kept - spread:
                line[position] -= 1
                excess -= sizes[position]
        candidates = list(range(len(sizes)))  # only where the important blocks are the large ones
    return line


def _plan(blocks: list[Block], patterns: list[tuple[Pattern, ...]], *, strict: bool) -> Plan:
    """Each block's planes for its linear layers; a weight that comes again keeps those of its first block."""
    chosen: dict[str, tuple[Pattern, ...]] = {}
    left: dict[str, str] = {}
    first_name: dict[int, str] = {}
    same_as: dict[str, str] = {}
    for block, planes in zip(blocks, patterns, strict=True):
        for name, module in block.linears().items():
            try:
                for pattern in planes:
                    pattern.check(linear_weight(module).shape[1])
            except PatternError as error:
                if strict:
                    raise PatternError(f"{name}: {error} (refused because of --strict)") from None
                left[name] = str(error)
            else:
                first = first_name.setdefault(id(module.weight), name)
                if first != name:
                    same_as[name] = first
                chosen[name] = chosen.get(first, planes)
    if not chosen:
        first, reason = next(iter(left.items()))
        raise PatternError(f"no layer can take {format_patterns(patterns[0])}; {first}: {reason}")
    return Plan(chosen, left, same_as)
