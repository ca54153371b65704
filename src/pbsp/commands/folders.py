"""The folders that commands write."""

from pathlib import Path

from pbsp.errors import ConfigError, OutputError
from pbsp.save import check_target


def check_folders(
    source: str, output: str | None, *, overwrite: bool, resume: bool, work: str = "compression"
) -> None:
    """Refuse an output folder that cannot be written, or an unfinished run that --resume does not go with."""
    if output is None:
        raise ConfigError("Missing option '--output': name a folder to write, or see --dry-run")
    check_target(Path(output), source=source, overwrite=overwrite)
    kept = unfinished_of(output)
    if kept.exists() and not resume:
        raise OutputError(f"{kept} holds an unfinished {work}; go on with --resume, or delete it")
    if resume and not kept.exists():
        raise OutputError(f"there is nothing to resume: {kept} does not exist")


def unfinished_of(output: str) -> Path:
    """Where a run that writes to `output` keeps what it has finished."""
    return Path(f"{output.rstrip('/')}.unfinished")
