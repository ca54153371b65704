"""What torchrun says of this process, and which of several processes tells the user why a run ends.

Nothing here imports torch before it is needed: every command asks, and most run in one process.
"""

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from pbsp.errors import ConfigError, RankError

_PATIENCE = timedelta(seconds=5)  # torchrun's store answers within milliseconds, or is gone


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of a run; `local_rank` counts those of this machine alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place() -> Place:
    """As torchrun's environment has it. What other launchers say is not looked at: they may mean others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place()
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Place(rank, size, local_rank)


def check_command(arguments: list[str]) -> None:
    """Raise ConfigError if several processes were started for a command that runs in one."""
    if place().size > 1 and arguments[:1] != ["compress"]:
        command = " ".join(["pbsp", *arguments[:1]])
        raise ConfigError(f"{command} runs in one process: start it without torchrun")


def watch_end() -> None:
    """Let SIGTERM raise RankError in a process among several, so that it clears up before it ends.

    torchrun sends it to all processes as soon as one has failed.
    """
    if place().size > 1:
        signal.signal(signal.SIGTERM, _ended)


def speaks() -> bool:
    """Whether this process tells the user why the run ends: of several the first that asks, once."""
    here = place()
    if here.size == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself now, and its line must get out
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage] - it is documented there
            address, port, is_master=False, timeout=_PATIENCE, wait_for_workers=False
        )
        return store.add(f"pbsp has told why attempt {attempt} ended", 1) == 1
    except dist.DistError:  # torchrun is gone
        return here.rank == 0


def _ended(*_: object) -> NoReturn:
    raise RankError(
        "told to stop by SIGTERM, as torchrun does when another process has ended (its own output says which "
        "and how); what was finished is kept, go on with --resume"
    )
