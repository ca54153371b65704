"""The hidden states of all calibration windows at one place of the model: in memory, or in a file.

They stay in memory with a model that does, and go to a file with one that is read block by block: for 128
windows of 2048 tokens and 4096 features they take 4.3 GB in float32.
"""

import tempfile
from collections.abc import Sequence
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.errors import OutputError
from pbsp.models.shards import shards_of


class FiledStates(Sequence[Tensor]):
    """States of one shape in a file without a name, which is gone when the process is, however it ends.

    Args:
        folder: on the disk to use.
        device: of the states that are given out.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._like = torch.empty(0)
        self._windows = 0

    def __len__(self) -> int:
        return self._windows

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride] - of one window, not of slices
        self, window: int
    ) -> Float[Tensor, "1 tokens features"]:
        """A copy of a window's state."""
        if not 0 <= window < self._windows:
            raise IndexError(window)
        state = torch.empty_like(self._like, device="cpu")
        place = memoryview(_bytes_of(state))
        self._file.seek(window * len(place))
        while place:
            place = place[self._read_into(place) :]
        return state.to(self._device)

    def __setitem__(self, window: int, state: Float[Tensor, "1 tokens features"]) -> None:
        assert (state.shape, state.dtype) == (self._like.shape, self._like.dtype), "states are of one kind"
        left = memoryview(_bytes_of(state.detach().cpu().contiguous()))
        try:
            self._file.seek(window * len(left))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(f"the hidden states do not fit in {self._folder}: {error.strerror}") from None

    def append(self, state: Float[Tensor, "1 tokens features"]) -> None:
        """Add the next window's state."""
        if not self._windows:
            self._like = torch.empty_like(state, device="meta")
        self[self._windows] = state
        self._windows += 1

    def _read_into(self, place: memoryview) -> int:
        count = self._file.readinto(place)  # pyright: ignore[reportAttributeAccessIssue] - it is unbuffered
        assert count, "the file holds all windows"
        return count


States = list[Tensor] | FiledStates
"""One tensor a window, in the order of the windows."""


def no_states(model: nn.Module) -> States:
    """Where the model's hidden states go; empty."""
    shards = shards_of(model)
    return [] if shards is None else FiledStates(shards.scratch, shards.device)


def copied(model: nn.Module, states: States) -> States:
    """The same states, to be changed apart."""
    copies = no_states(model)
    for state in states:
        copies.append(state)
    return copies


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
