"""What `pbsp inspect` does after parsing: count a folder's files and print what they hold."""

from pathlib import Path

from pbsp.commands.console import print_json, print_tables
from pbsp.commands.tables import bytes_table, layer_table, summary_table
from pbsp.inspection import Inspection, inspect_folder


def run_inspect(folder: str, *, json: bool) -> None:
    """`pbsp inspect`."""
    found = inspect_folder(Path(folder))
    if json:
        print_json(found.to_dict())
        return
    print_tables(layer_table(found.layers))
    print_left(found)
    print_tables(bytes_table(found), summary_table(found))


def print_left(found: Inspection) -> None:
    """The layers that are as they were, and why."""
    for name, reason in found.left_uncompressed.items():
        print(f"left uncompressed: {name}: {reason}")
