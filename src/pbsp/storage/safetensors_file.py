"""The bytes of a safetensors file: how many there will be, and writing them one tensor at a time.

The format's own writer takes all tensors at once. Both give the same file.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pbsp.storage.bits import TensorSpec

_ORDER = (  # as the format's own writer sorts tensors, the last first
    (torch.bool, "BOOL"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.int16, "I16"),
    (torch.float16, "F16"),
    (torch.bfloat16, "BF16"),
    (torch.int32, "I32"),
    (torch.float32, "F32"),
    (torch.float64, "F64"),
    (torch.int64, "I64"),
)
_RANK = {dtype: rank for rank, (dtype, _) in enumerate(_ORDER)}
_NAME = dict(_ORDER)
_ALIGNMENT = 8


def safetensors_bytes(tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str]) -> int:
    """Bytes of the file with these tensors: header and data.

    Args:
        tensors: name and what is stored.
        metadata: the header's own entry.
    """
    ordered = _ordered(tensors)
    return len(_header(ordered, metadata)) + sum(spec.bits // 8 for _, spec in ordered)


def write_safetensors(
    file: Path,
    tensors: Iterable[tuple[str, TensorSpec]],
    values: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the file that `save_file` would, with one tensor in memory at a time.

    Args:
        file: to write; replaced if there is one.
        tensors: name and what is stored.
        values: gives a tensor by its name.
        metadata: the header's own entry.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    ordered = _ordered(tensors)
    with file.open("wb") as opened:
        opened.write(_header(ordered, metadata))
        for name, spec in ordered:
            tensor = values(name).detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
            opened.write(tensor.view(-1).view(torch.uint8).numpy().data)


def _ordered(tensors: Iterable[tuple[str, TensorSpec]]) -> list[tuple[str, TensorSpec]]:
    return sorted(tensors, key=lambda item: (-_RANK[item[1].dtype], item[0]))


def _header(ordered: list[tuple[str, TensorSpec]], metadata: Mapping[str, str] | None) -> bytes:
    """The file's bytes before the first tensor."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in ordered:
        end = offset + spec.bits // 8
        header[name] = {
            "dtype": _NAME[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = written + b" " * (-len(written) % _ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded
