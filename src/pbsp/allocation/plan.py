"""What is done with every linear layer: its planes or integers, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from pbsp.allocation.entry import Entry, check_entry, format_entry
from pbsp.errors import PatternError
from pbsp.models.blocks import Block, linear_weight


@dataclass(frozen=True)
class Plan:
    """What is done with every linear layer of the decoder blocks, in order.

    Attributes:
        entries: linear layer → what it is stored as.
        left_uncompressed: linear layer that stays as it is → reason.
        same_as: linear layer → an earlier one with the same weight tensor, whose entry it takes.
    """

    entries: dict[str, Entry]
    left_uncompressed: dict[str, str]
    same_as: dict[str, str]


def uniform_plan(blocks: list[Block], entry: Entry, *, strict: bool) -> Plan:
    """The same for every linear layer whose rows can be stored so.

    Raises:
        PatternError: no layer can take the entry, or, with `strict`, one layer cannot.
    """
    return block_plan(blocks, [entry] * len(blocks), strict=strict)


def block_plan(blocks: list[Block], entries: Sequence[Entry], *, strict: bool) -> Plan:
    """Each block's entry for its linear layers; a weight that comes again keeps that of its first block."""
    chosen: dict[str, Entry] = {}
    left: dict[str, str] = {}
    first_name: dict[int, str] = {}
    same_as: dict[str, str] = {}
    for block, entry in zip(blocks, entries, strict=True):
        for name, module in block.linears().items():
            try:
                check_entry(entry, linear_weight(module).shape[1])
            except PatternError as error:
                if strict:
                    raise PatternError(f"{name}: {error} (refused because of --strict)") from None
                left[name] = str(error)
            else:
                first = first_name.setdefault(id(module.weight), name)
                if first != name:
                    same_as[name] = first
                chosen[name] = chosen.get(first, entry)
    if not chosen:
        first, reason = next(iter(left.items()))
        raise PatternError(f"no layer can take {format_entry(entries[0])}; {first}: {reason}")
    return Plan(chosen, left, same_as)
