"""What is done with every linear layer: its planes, or none."""

from dataclasses import dataclass

from pbsp.errors import PatternError
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


def uniform_plan(blocks: list[Block], patterns: tuple[Pattern, ...], *, strict: bool) -> Plan:
    """The same planes for every linear layer whose rows they tile.

    Raises:
        PatternError: no layer can take the patterns, or, with `strict`, one layer cannot.
    """
    return block_plan(blocks, [patterns] * len(blocks), strict=strict)


def block_plan(blocks: list[Block], patterns: list[tuple[Pattern, ...]], *, strict: bool) -> Plan:
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
