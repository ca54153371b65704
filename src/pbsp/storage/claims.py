"""A folder's claim: the settings that everything in it was made with, so that other work is refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pbsp.errors import ConfigError, FormatError, OutputError

_DIGEST = " digest"  # ends the names of settings that say the same as others, only surely


def claim(file: Path, settings: Mapping[str, str], *, what: str) -> None:
    """Write the settings to `file`, or compare them with those that are there.

    Args:
        file: in the folder that is claimed.
        settings: name → value. A difference in a name that ends in "digest" is only told where no
            other name differs.
        what: the folder's work, as "comparison".

    Raises:
        ConfigError: the folder is claimed by other settings; says which.
        FormatError, OutputError: the file cannot be read or written.
    """
    if not file.is_file():
        write_whole(file, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
        return
    found = read_object(file)
    differing = [
        name for name in {**found, **settings} if found.get(name, "none") != settings.get(name, "none")
    ]
    plain = [name for name in differing if not name.endswith(_DIGEST)] or differing
    if plain:
        parts = [
            f"{name} is {found.get(name, 'none')} there and {settings.get(name, 'none')} here"
            for name in plain
        ]
        raise ConfigError(f"{file.parent} holds another {what}: {'; '.join(parts)}; name a new folder")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; FormatError if it cannot be read or is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read ({error}); delete it to measure it again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{file} is not an object; delete it to measure it again")
    return values


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is there as a whole or not at all; OutputError if that fails."""
    partial = file.with_name(f".{file.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}") from None
