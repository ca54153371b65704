"""Bits of what is stored: one counter for tensors that exist and for those that a layout calls for."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

CODES = "weight"
"""The packed tensor that has the name of a linear's weight; the others' names begin with it."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor, and what it holds, in words."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def bits(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize * 8


def stored_bits(tensors: Iterable[Tensor]) -> int:
    """Bits that the data of `tensors` takes in a file, counted from their bytes."""
    return sum(tensor.nbytes * 8 for tensor in tensors)
