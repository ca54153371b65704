"""The folder of a comparison: what it was measured on, and one file for every finished row.

compare.json     what every number in the folder was measured on
rows/ROW.json    a row's result, there when the row is finished
cache/           the original's predictions; can be deleted, and is made again when needed
models/ROW/      compressed models, where they are kept
table.json, table.md, perplexity.png, importance.png
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pbsp.comparison.result import RowResult
from pbsp.comparison.rows import Row
from pbsp.errors import ConfigError, FormatError, OutputError
from pbsp.storage.folder import check_output

_SETTINGS = "compare.json"
_DIGEST = " digest"  # ends the names of settings that say the same as others, only surely


class ComparisonFolder:
    """A folder that one comparison grows in, over as many commands as it takes."""

    def __init__(self, path: Path) -> None:
        """Look at the folder without changing it.

        Raises:
            OutputError: it holds something else, or cannot be written.
        """
        self.path = path
        if path.is_dir() and any(path.iterdir()):
            if not (path / _SETTINGS).is_file():
                raise OutputError(f"{path} is not empty and holds no comparison; choose another folder")
            if not os.access(path, os.W_OK | os.X_OK):
                raise OutputError(f"{path} is not writable; choose another folder")
        else:
            check_output(path, overwrite=False)

    def claim(self, settings: Mapping[str, str]) -> None:
        """Make the folder this comparison's; ConfigError, naming what differs, if it is another's."""
        file = self.path / _SETTINGS
        if not file.is_file():
            self.write(_SETTINGS, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
            return
        found = _read(file)
        differing = [
            name for name in {**found, **settings} if found.get(name, "none") != settings.get(name, "none")
        ]
        plain = [name for name in differing if not name.endswith(_DIGEST)] or differing
        if plain:
            parts = [
                f"{name} is {found.get(name, 'none')} there and {settings.get(name, 'none')} here"
                for name in plain
            ]
            raise ConfigError(f"{self.path} holds another comparison: {'; '.join(parts)}; name a new folder")

    def rows(self) -> dict[str, RowResult]:
        """The rows that are there, by name."""
        results = [_read_row(file) for file in sorted(self.path.glob("rows/*.json"))]
        return {result.name: result for result in results}

    def add(self, row: Row, result: RowResult) -> None:
        """Write a finished row."""
        text = json.dumps(result.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        self.write(f"rows/{row.slug}.json", text + "\n")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder as a whole; OutputError if that fails."""
        file = self.path / name
        partial = file.with_name(f".{file.name}.partial")
        data = content.encode() if isinstance(content, str) else content
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, file)
        except OSError as error:
            raise OutputError(f"{file} cannot be written: {error.strerror}") from None

    def cache(self, digest: str) -> Path:
        """Where the original's predictions on windows of this digest are kept."""
        return self.path / "cache" / digest[:16]

    def model(self, row: Row) -> Path:
        """Where the compressed model of a row is kept."""
        return self.path / "models" / row.slug


def _read_row(file: Path) -> RowResult:
    try:
        return RowResult.from_json(_read(file))
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file} is not a row's result ({error}); delete it to measure it again") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read ({error}); delete it to measure it again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{file} is not an object; delete it to measure it again")
    return values
