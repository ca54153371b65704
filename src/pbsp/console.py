"""What the subcommands share to talk to people and machines: bars on stderr, tables or JSON on stdout."""

import json
import os
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

_WIDTH_OF_FILES = 120
_STAGES = {"sample": "sampling text", "compress": "compressing blocks", "evaluate": "evaluating"}


@contextmanager
def bars() -> Iterator[Any]:
    """A progress callback (stage, done, total) that draws a bar with an ETA on stderr per stage."""
    with new_bars() as drawn:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(_STAGES.get(stage, stage), total=total)
            drawn.update(tasks[stage], completed=done, total=total)

        yield progress


def new_bars(*, memory_seconds: float = 30.0) -> Progress:
    """Bars with an ETA on stderr, nothing where that is no terminal.

    Args:
        memory_seconds: how far back the speed is looked at.
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
    return Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=memory_seconds
    )


def print_tables(*tables: Table) -> None:
    """Tables on stdout, wide enough for their content where no terminal says otherwise."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(*tables)


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(values, indent=1, allow_nan=False))
