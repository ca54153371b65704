"""What a compression has finished, kept on disk so that it can go on after a crash.

settings.json                  what the run was started with
plan.json                      the planes of every layer, once they are chosen
weights.safetensors            weights of tokens, where the plan has them; written before it
block-0003.json                its layers' entries and reports, SHA-256 of the two files below; written last
block-0003.safetensors         all its tensors: the packed ones, norms, biases, what stays as it is
hidden-0003.safetensors        the hidden states behind it; those of the last two blocks are kept
tuning.pt                      the state of tuning the whole model, every few steps
lock                           held by the process that works here
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbsp.errors import FormatError, OutputError
from pbsp.recovery.tuning_file import TuningFile
from pbsp.storage.bits import TensorSpec
from pbsp.storage.claims import claim, read_object, write_whole
from pbsp.storage.safetensors_file import write_safetensors

_WEIGHTS = "weights.safetensors"
_HIDDEN_KEPT = 2


@dataclass(frozen=True)
class FinishedBlock:
    """One block's results.

    Attributes:
        tensors: all tensors to rebuild its layers from, by full name.
        entries: plain values for JSON, as the caller needs them.
    """

    tensors: dict[str, Tensor]
    entries: dict[str, Any]


class Unfinished:
    """The folder of one unfinished compression."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which is made if need be.

        Raises:
            OutputError: another process works in it, or it cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}") from None
        if not _locked(self._lock):
            raise OutputError(f"another process works in {folder}; wait for it, or name another output")

    def claim(self, settings: Mapping[str, str]) -> None:
        """Make the folder this run's; ConfigError, naming what differs, if it is another's."""
        claim(self.folder / "settings.json", settings, what="unfinished compression")

    def plan(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The plan that was kept, and its tensors; None where there is none yet."""
        file = self.folder / "plan.json"
        return (read_object(file), load_file(self.folder / _WEIGHTS)) if file.is_file() else None

    def keep_plan(self, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep the plan; OutputError if the disk is full."""
        try:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, self.folder / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self.folder / _WEIGHTS} cannot be written: {error}") from None
        write_whole(self.folder / "plan.json", json.dumps(dict(plan), indent=1))

    @property
    def tuning(self) -> TuningFile:
        """Where the tuning of the whole model is kept."""
        return TuningFile(self.folder / "tuning.pt")

    def finished(self) -> int:
        """How many blocks, from the first, are whole with the hidden states behind the last of them."""
        count = 0
        while self._whole(count, "block"):
            count += 1
        while count and not self._whole(count - 1, "hidden"):
            count -= 1
        return count

    def block(self, index: int) -> FinishedBlock:
        """The results of a finished block."""
        return FinishedBlock(load_file(self._file("block", index)), self.entries(index))

    def entries(self, index: int) -> dict[str, Any]:
        """The plain values of a finished block's results."""
        return read_object(self._file("block", index, "json"))["entries"]

    def tensor(self, index: int, name: str) -> Tensor:
        """One of a finished block's tensors."""
        return _read(self._file("block", index), name)

    def hidden(self, index: int) -> Iterator[Tensor]:
        """Every window's hidden states behind a finished block, one window in memory at a time."""
        file = self._file("hidden", index)
        with safe_open(file, framework="pt") as opened:
            windows = len(opened.keys())
        return (_read(file, f"{window:06d}") for window in range(windows))

    def keep(self, index: int, block: FinishedBlock, *hidden: Sequence[Tensor]) -> None:
        """Keep a block's results, and the hidden states behind it.

        Args:
            hidden: of every window, one after another; more than one sequence where there are several walks.

        Raises:
            OutputError: the disk is full.
        """
        places = [(states, window) for states in hidden for window in range(len(states))]

        def state(name: str) -> Tensor:
            states, window = places[int(name)]
            return states[window]

        like = TensorSpec(tuple(hidden[0][0].shape), hidden[0][0].dtype, "")
        every = [(f"{number:06d}", like) for number in range(len(places))]
        digests = {
            "hidden": self._write("hidden", index, every, state),
            "block": self._write("block", index, _specs(block.tensors), block.tensors.__getitem__),
        }
        written = json.dumps({"entries": block.entries, "sha256": digests})
        write_whole(self._file("block", index, "json"), written)
        if index >= _HIDDEN_KEPT:
            self._file("hidden", index - _HIDDEN_KEPT).unlink(missing_ok=True)

    @contextmanager
    def cleared_if_empty(self) -> Iterator[None]:
        """Remove the folder if an error, or Ctrl-C, ends the context before it holds any result."""
        try:
            yield
        except BaseException:
            if not self.finished() and not self.tuning.path.exists():
                self.remove()
            raise

    def remove(self) -> None:
        """Delete the folder's files, and the folder."""
        for file in self.folder.iterdir():
            file.unlink()
        self._lock.close()
        self.folder.rmdir()

    def _file(self, kind: str, index: int, suffix: str = "safetensors") -> Path:
        return self.folder / f"{kind}-{index:04d}.{suffix}"

    def _write(
        self, kind: str, index: int, specs: list[tuple[str, TensorSpec]], values: Callable[[str], Tensor]
    ) -> str:
        file = self._file(kind, index)
        try:
            write_safetensors(file, specs, values)
            return _digest(file)
        except OSError as error:
            raise OutputError(f"{file} cannot be written: {error}") from None

    def _whole(self, index: int, kind: str) -> bool:
        """Whether a file of a block is there as it was written."""
        try:
            values = read_object(self._file("block", index, "json"))
            return values["sha256"][kind] == _digest(self._file(kind, index))
        except (FormatError, OSError, KeyError, TypeError):
            return False


def _specs(tensors: Mapping[str, Tensor]) -> list[tuple[str, TensorSpec]]:
    return [(name, TensorSpec(tuple(tensor.shape), tensor.dtype, "")) for name, tensor in tensors.items()]


def _read(file: Path, name: str) -> Tensor:
    """A copy of one tensor; nothing of the file stays mapped into memory."""
    with safe_open(file, framework="pt", backend="pread") as opened:
        return opened.get_tensor(name)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _locked(file: Any) -> bool:
    """Whether the file could be locked; always, where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
