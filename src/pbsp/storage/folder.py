"""The output folder: checked before any work, and there under its name only when it is whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pbsp.errors import OutputError


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless a model can be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose a folder for the output")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} exists and is not empty; choose another folder or pass --overwrite")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, so {folder} cannot be created")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable, so {folder} cannot be created")


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name, and its place, when the block succeeds.

    Whatever ends the block early, the temporary folder is removed and `folder` is as it was.

    Raises:
        OutputError: see `check_output`; or the disk is full, or writing fails otherwise.
    """
    check_output(folder, overwrite=overwrite)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.absolute().parent))
    except OSError as error:
        raise OutputError(f"{folder} cannot be created: {error.strerror}") from error
    try:
        partial.chmod(0o755)  # mkdtemp makes it private
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise OutputError(f"writing {folder} failed, nothing was left behind: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_bytes(folder: Path) -> dict[str, int]:
    """Size of every file in the folder, by its path within it."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
