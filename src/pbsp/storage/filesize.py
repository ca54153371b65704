"""The exact size of a safetensors file that is not written yet."""

import json
from collections.abc import Iterable, Mapping

import torch

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
    ordered = sorted(tensors, key=lambda item: (-_RANK[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in ordered:
        end = offset + spec.bits // 8
        header[name] = {
            "dtype": _NAME[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-written // _ALIGNMENT) * _ALIGNMENT + offset
