"""A plan as a small file that people read, change and replay: one line for every linear layer."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pbsp.allocation.entry import Entry, check_entry, format_entry, parse_entry
from pbsp.allocation.plan import Plan
from pbsp.errors import ConfigError, PatternError
from pbsp.models.blocks import Block, linear_weight

PLAN_FILE = "plan.toml"
KEPT = "16 bit"
_TABLE = "layers"
_HEADER = f"""\
# Every linear layer: planes, N:M or e8-BITS, joined by +, as "4:8+2:8"; integers, "2 bit", "3 bit", "4 bit"
# or "8 bit"; "{KEPT}" leaves it as it is.
# Replay it, changed or not, with pbsp compress --plan FILE.
"""


def plan_text(layers: Mapping[str, str]) -> str:
    """The file's content; `layers` as `read_plan` gives them."""
    lines = [f"{json.dumps(name)} = {json.dumps(written)}" for name, written in layers.items()]
    return f"{_HEADER}\n[{_TABLE}]\n" + "\n".join(lines) + "\n"


def written_plan(plan: Plan) -> dict[str, str]:
    """Linear layer → how it is stored, as the file says it, in the plan's order."""
    chosen = {name: format_entry(entry) for name, entry in plan.entries.items()}
    return {**chosen, **dict.fromkeys(plan.left_uncompressed, KEPT)}


def read_plan(path: Path) -> dict[str, str]:
    """Linear layer → how it is stored, as the file says it.

    Raises:
        ConfigError: the file cannot be read or holds something else; it says where.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; --plan takes a compressed model's {PLAN_FILE}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a plan: {error}") from None
    layers = values.get(_TABLE)
    if set(values) != {_TABLE} or not isinstance(layers, dict) or not layers:
        raise ConfigError(f"{path} is not a plan: it must have one table, [{_TABLE}], with a line a layer")
    check_written(layers)
    return layers


def check_written(layers: Mapping[str, object]) -> None:
    """Raise ConfigError, naming the layer, unless every value is planes, integers or KEPT."""
    for name, written in layers.items():
        if written == KEPT:
            continue
        try:
            parse_entry(written if isinstance(written, str) and written else repr(written))
        except PatternError as error:
            raise ConfigError(f'plan: {name}: {error}; or integers, as "3 bit", or "{KEPT}"') from None


def plan_of(blocks: list[Block], layers: Mapping[str, str]) -> Plan:
    """The plan that the file describes, for this model.

    Raises:
        ConfigError: it names a layer that the model lacks, lacks one that it has, or gives two with one
            weight tensor different ones.
        PatternError: a layer's rows cannot be stored so, or none is compressed.
    """
    modules = {name: module for block in blocks for name, module in block.linears().items()}
    for name in layers:
        if name not in modules:
            raise ConfigError(f"plan: the model has no linear layer {name} in its decoder blocks")
    entries: dict[str, Entry] = {}
    left, same_as = {}, {}
    first_name: dict[int, str] = {}
    for name, module in modules.items():
        if name not in layers:
            raise ConfigError(f'plan: {name} is not in it; give its planes or integers, or "{KEPT}"')
        if layers[name] == KEPT:
            left[name] = "kept by the plan"
            continue
        entries[name] = parse_entry(layers[name])
        try:
            check_entry(entries[name], linear_weight(module).shape[1])
        except PatternError as error:
            raise PatternError(f"plan: {name}: {error}") from None
        first = first_name.setdefault(id(module.weight), name)
        if first != name:
            same_as[name] = first
            if entries[name] != entries[first]:
                raise ConfigError(f"plan: {first} and {name} share one weight; give both the same")
    if not entries:
        raise PatternError("plan: it leaves every layer as it is; nothing would be compressed")
    return Plan(entries, left, same_as)
