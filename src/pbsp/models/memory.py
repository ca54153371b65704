"""Whether a model fits in memory as a whole, or is to be read block by block."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from pbsp.errors import ConfigError
from pbsp.models.folder import weight_files

_SHARE = 0.7  # of the memory that is free: solving a block and the packed layers need some, too
_CHOICES = ("auto", "whole", "blocks")
_GROUP = Path("/sys/fs/cgroup")


def check_memory(requested: str) -> None:
    """Raise ConfigError unless the way to use memory is known."""
    if requested not in _CHOICES:
        raise ConfigError(f"memory {requested!r} is unknown; choose {', '.join(_CHOICES)}")


def in_blocks(requested: str, folder: Path, *, device: torch.device, itemsize: int, tokens: int) -> bool:
    """Whether to read the model block by block.

    Args:
        requested: "whole" or "blocks"; "auto" asks whether weights and hidden states would take more than
            70 % of the memory that is free.
        folder: of the model.
        device: whose memory counts.
        itemsize: bytes of a number.
        tokens: whose hidden states are held.

    Raises:
        ConfigError: see `check_memory`.
    """
    check_memory(requested)
    if requested != "auto":
        return requested == "blocks"
    return not has_room(whole_bytes(folder, itemsize, tokens), device)


def has_room(needed: int, device: torch.device) -> bool:
    """Whether so many bytes are at most 70 % of the memory that is free, as far as that is known."""
    free = free_bytes(device)
    return free is None or needed <= _SHARE * free


def whole_bytes(folder: Path, itemsize: int, tokens: int) -> int:
    """What weights and hidden states take in memory; weights in a .bin file are taken for 16 bit."""
    files = weight_files(folder)
    if files[0].suffix == ".safetensors":
        weights = sum(map(_numbers, files))
    else:
        weights = sum(file.stat().st_size for file in files) // 2
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    features = text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 0
    return itemsize * (weights + tokens * features)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had: the GPU's, or the machine's within the limits of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine, limit = Path("/proc/meminfo"), _GROUP / "memory.max"
    if not machine.is_file():
        return None  # not Linux
    free = 1024 * _listed(machine, "MemAvailable:")
    allowed = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    if allowed.isdigit():
        free = min(free, int(allowed) - _listed(_GROUP / "memory.stat", "anon"))
    return free


def _listed(file: Path, name: str) -> int:
    """The number that a line of the file gives under a name."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return next(int(words[1]) for words in lines if words[0] == name)


def _numbers(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
