"""Names, shapes and bits of what is stored: one source for checks, exact prediction and reports."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pbsp.binarization.planes import block_count
from pbsp.pruning.pattern import Pattern
from pbsp.storage.packing import row_bytes

CODES = "weight"
SCALES = "weight_scale"
OFFSETS = "weight_scale_offset"


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize * 8


def packed_shapes(
    patterns: tuple[Pattern, ...], out_features: int, in_features: int, scale_block: int
) -> dict[str, TensorSpec]:
    """The stored tensors of a packed linear, by the last part of their names; the bias is not among them.

    Raises:
        PatternError: a pattern does not tile the rows.
    """
    for pattern in patterns:
        pattern.check(in_features)
    code_bytes = sum(row_bytes(pattern, in_features) for pattern in patterns)
    scales = len(patterns) * block_count(in_features, scale_block)
    return {
        CODES: TensorSpec((out_features, code_bytes), torch.uint8),
        SCALES: TensorSpec((out_features, scales), torch.uint8),
        OFFSETS: TensorSpec((len(patterns),), torch.int8),
    }


def predicted_bits(
    patterns: tuple[Pattern, ...], out_features: int, in_features: int, scale_block: int
) -> int:
    """What `stored_bits` will count for such a linear, before it exists."""
    return sum(spec.bits for spec in packed_shapes(patterns, out_features, in_features, scale_block).values())


def stored_bits(tensors: Iterable[Tensor]) -> int:
    """Bits that the data of `tensors` takes in a file, counted from their bytes."""
    return sum(tensor.nbytes * 8 for tensor in tensors)


def nominal_bits(patterns: tuple[Pattern, ...]) -> float:
    """Bits per weight as the papers count them, one per kept weight: ΣN/M; 0.75 for 4:8+2:8."""
    return sum(pattern.nominal_bits for pattern in patterns)
