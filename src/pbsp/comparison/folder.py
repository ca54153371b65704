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

from pbsp.comparison.result import RowResult
from pbsp.comparison.rows import Row
from pbsp.errors import FormatError, OutputError
from pbsp.storage.claims import claim, read_object, write_whole
from pbsp.storage.folder import check_output

_SETTINGS = "compare.json"


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
        claim(self.path / _SETTINGS, settings, what="comparison")

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
        write_whole(self.path / name, content)

    def cache(self, digest: str) -> Path:
        """Where the original's predictions on windows of this digest are kept."""
        return self.path / "cache" / digest[:16]

    def model(self, row: Row) -> Path:
        """Where the compressed model of a row is kept."""
        return self.path / "models" / row.slug


def _read_row(file: Path) -> RowResult:
    try:
        return RowResult.from_json(read_object(file))
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file} is not a row's result ({error}); delete it to measure it again") from None
