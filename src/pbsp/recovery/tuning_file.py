"""The state of an unfinished tuning, kept in one file."""

import os
from pathlib import Path
from typing import Any

import torch

from pbsp.errors import OutputError


class TuningFile:
    """A file that is there as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last, its tensors on `device`; None where nothing was."""
        return torch.load(self.path, map_location=device, weights_only=True) if self.path.is_file() else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace what is there by tensors and plain values; OutputError if the disk is full."""
        partial = self.path.with_suffix(".partial")
        try:
            torch.save(state, partial)
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            raise OutputError(f"{self.path} cannot be written: {error}") from None
