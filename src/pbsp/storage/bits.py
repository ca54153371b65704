"""Bits of what is stored: one counter for tensors that exist and for those that a layout calls for."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Integer
from torch import Tensor

from pbsp.binarization.rotation import SIZES
from pbsp.errors import FormatError

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


def check_rotated(in_features: int, rotation: int) -> None:
    """Raise FormatError unless rows can be rotated by Hadamard matrices of this size; 1: they are not."""
    if rotation not in SIZES or in_features % rotation:
        raise FormatError(f"rows of {in_features} weights have no rotation of size {rotation}")


def rotated(rotation: int) -> str:
    """The end of a layout's line in `checkpoint.packed_digest`."""
    return "" if rotation == 1 else f" {rotation}"


def stored_bits(tensors: Iterable[Tensor]) -> int:
    """Bits that the data of `tensors` takes in a file, counted from their bytes."""
    return sum(tensor.nbytes * 8 for tensor in tensors)


class Stream(NamedTuple):
    """Numbers that a file would hold at `width` bits each, and what they are, in words.

    The streams of a matrix, with its shape and its method's fields, are enough to rebuild it.
    """

    kind: str
    numbers: Integer[Tensor, "count"]
    width: int


def streams_bits(streams: Iterable[Stream]) -> int:
    """Bits that the numbers of `streams` take, end to end; no padding."""
    return sum(stream.numbers.numel() * stream.width for stream in streams)
