"""What the subcommands share to talk to people and machines: bars on stderr, tables or JSON on stdout."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pbsp.errors import ConfigError

_WIDTH_OF_FILES = 120
_STAGES = {
    "sample": "sampling text",
    "plan": "planning",
    "compress": "compressing blocks",
    "evaluate": "evaluating",
}
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes written as 60MB, 1.5GiB or 60000000; ConfigError otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = _UNITS.get(match[2].removesuffix("b") + "b" if match[2] else "") if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not a size; write it as 60MB, 1.5GiB or in bytes")
    return int(float(match[1]) * unit)


@contextmanager
def bars(*, shown: bool = True) -> Iterator[Any]:
    """A progress callback (stage, done, total) that draws a bar per stage on stderr; none unless `shown`."""
    with new_bars(shown=shown) as drawn:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(_STAGES.get(stage, stage), total=total)
            drawn.update(tasks[stage], completed=done, total=total)

        yield progress


def new_bars(*, memory_seconds: float = 30.0, shown: bool = True) -> Progress:
    """Bars with an ETA on stderr, nothing where that is no terminal.

    Args:
        memory_seconds: how far back the speed is looked at.
        shown: False for nothing, also on a terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return Progress(*columns, console=console, disable=hidden, speed_estimate_period=memory_seconds)


def print_tables(*tables: Table) -> None:
    """Tables on stdout, wide enough for their content where no terminal says otherwise."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(*tables)


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(values, indent=1, allow_nan=False))
