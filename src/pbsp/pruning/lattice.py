"""Codes of eight weights that are short vectors of the lattice E8: more magnitudes than −1, 0 and 1.

E8 is the densest packing of spheres in eight dimensions. Its shortest vectors are the 112 codes of 2:8 and
half of the dense signs, those with an even number of minuses, at half the size; 4:8 lies in the next shell.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor

from pbsp.errors import PatternError

_LARGEST_NORM = 24  # of doubled vectors: three shells, 9,120 of them
_SCATTER = 0x9E3779B1  # odd; multiplied by it modulo 2^32, neighbouring keys lie far apart
_KEY_OF_ZERO = (9**8 - 1) // 2
_FIRST_SCALES = {8: 0.825, 9: 0.725, 10: 0.675, 12: 0.625}  # codes of 11 bits would cross three bytes


@dataclass(frozen=True, order=True)
class Lattice:
    """Any of the 2^bits shortest vectors of E8 but 0 for every eight weights of a row; written "e8-12".

    Raises:
        PatternError: there are no such codes.

    Source: lattices as codes of weights, QuIP# (arXiv 2402.04396); this set of vectors is this project's.
    """

    bits: int
    group: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.bits not in _FIRST_SCALES:
            raise PatternError(
                f"e8-{self.bits} is not a code of E8; its codes have 8, 9, 10 or 12 bits, as in e8-12"
            )

    def __str__(self) -> str:
        return f"e8-{self.bits}"

    @property
    def code_bits(self) -> int:
        """Bits of one group's code."""
        return self.bits

    @property
    def code_count(self) -> int:
        """Codes that a group can have."""
        return 1 << self.bits

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the codes alone, without scales and row padding."""
        return self.bits / self.group

    @property
    def nominal_bits(self) -> float:
        """Bits per weight as papers count them: the same."""
        return self.bits_per_weight

    @property
    def first_scale(self) -> float:
        """The scale with the least squared error for weights of a normal distribution, σ = 1; measured."""
        return _FIRST_SCALES[self.bits]

    def check(self, in_features: int) -> None:
        """Raise PatternError unless whole groups tile a row of `in_features` weights."""
        if in_features % self.group:
            raise PatternError(
                f"{self} does not tile a row of {in_features} weights: {in_features % self.group} left over"
            )

    def codes(self, device: torch.device | None = None) -> Int8[Tensor, "codes group"]:
        """The vector of every code, doubled, so that all entries are whole: −4 to 4.

        The upper half are the lower half's negatives. A shell that is not taken whole gives vectors that lie
        scattered in it.
        """
        return _codes(self.bits, device or torch.device("cpu"))

    def holds(self, points: Float[Tensor, "groups group"]) -> Bool[Tensor, "groups"]:
        """Which of these points of E8, doubled as codes are, have a code."""
        points = points.double()  # exact, whatever is allowed to products of float32
        signed = (points @ 9.0 ** torch.arange(self.group, dtype=points.dtype, device=points.device)).long()
        keys = signed.abs() + _KEY_OF_ZERO  # of v or −v, whichever is taken
        norms = (points.square() @ points.new_ones(self.group)).clamp(max=_LARGEST_NORM + 1).long()
        last = _shortest()[(1 << (self.bits - 1)) - 1]
        largest = _order(last.square().sum(), vector_keys(last)).item()
        return (norms > 0) & (_order(norms, keys) <= largest)

    @staticmethod
    def parse(text: str) -> "Lattice":
        """The codes written as "e8-BITS"; PatternError if the text is anything else."""
        match = re.fullmatch(r"\s*e8-([0-9]{1,2})\s*", text)
        if match is None:
            raise PatternError(f"{text!r} is not a code of E8; write e8-BITS, as e8-12")
        return Lattice(int(match[1]))


def vector_keys(vectors: Tensor) -> Int64[Tensor, "*groups"]:
    """Σ (v_i + 4) 9^i of each doubled vector, along the last dimension; no two are the same."""
    return ((vectors.long() + 4) * 9 ** torch.arange(Lattice.group, device=vectors.device)).sum(-1)


@lru_cache(maxsize=16)
def _codes(bits: int, device: torch.device) -> Int8[Tensor, "codes group"]:
    return torch.cat([half := _shortest()[: 1 << (bits - 1)], -half]).to(torch.int8).to(device)


@lru_cache(maxsize=1)
def _shortest() -> Tensor:
    """One of every pair v, −v of doubled vectors, the shortest first.

    Their entries are all even or all odd, and add up to a multiple of 4.
    """
    even = torch.cartesian_prod(*[torch.arange(-4, 5, 2, device="cpu")] * 8)
    odd = torch.cartesian_prod(*[torch.arange(-3, 4, 2, device="cpu")] * 8)
    vectors = torch.cat([even, odd])
    norms = vectors.square().sum(1)
    vectors = vectors[(vectors.sum(1) % 4 == 0) & (norms > 0) & (norms <= _LARGEST_NORM)]
    keys = vector_keys(vectors)
    positive = keys > _KEY_OF_ZERO  # half of all: −v's key lies as far below it as v's above
    vectors, keys = vectors[positive], keys[positive]
    return vectors[_order(vectors.square().sum(1), keys).argsort()]


def _order(norms: Tensor, keys: Tensor) -> Tensor:
    """By which the vectors taken of pairs are sorted; no two have the same."""
    return norms * 2**32 + keys * _SCATTER % 2**32
