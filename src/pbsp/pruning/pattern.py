"""The N:M pattern: how many weights survive in every group of a row."""

import math
import re
from dataclasses import dataclass

from pbsp.errors import PatternError
from pbsp.pruning.lattice import Lattice

MAX_PLANES = 4
MAX_CODE_BITS = 31  # a code, its support's rank included, is unpacked as a non-negative int32


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep `kept` of every `group` consecutive weights in a row; written "kept:group", as in 4:8.

    Raises:
        PatternError: unless 1 ≤ kept ≤ group and the code of one group fits in 31 bits.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.group:
            raise PatternError(
                f"pattern {self} keeps {self.kept} of {self.group} weights; "
                f"it must keep between 1 and {self.group}, as in 4:8"
            )
        if self.code_bits > MAX_CODE_BITS:
            raise PatternError(
                f"pattern {self} needs {self.code_bits} bits for one group; at most {MAX_CODE_BITS} are "
                "supported, so choose a smaller group, as in 4:8 or 4:16"
            )

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def supports(self) -> int:
        """Number of ways to choose the kept positions of a group: C(group, kept)."""
        return math.comb(self.group, self.kept)

    @property
    def code_bits(self) -> int:
        """Bits of one group's code, rank(support)·2^N + signs: ceil(log2(C(M,N)·2^N)); 11 for 4:8."""
        return (self.supports - 1).bit_length() + self.kept

    @property
    def code_count(self) -> int:
        """Codes that a group can have; 1,120 for 4:8."""
        return self.supports << self.kept

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the codes alone, without scales and row padding; 1.375 for 4:8."""
        return self.code_bits / self.group

    @property
    def nominal_bits(self) -> float:
        """Bits per weight as the paper counts them, one per kept weight: N/M; 0.5 for 4:8."""
        return self.kept / self.group

    def check(self, in_features: int) -> None:
        """Raise PatternError unless whole groups tile a row of `in_features` weights."""
        if in_features % self.group:
            raise PatternError(
                f"pattern {self} does not tile a row of {in_features} weights: "
                f"{in_features % self.group} left over; choose a group that divides {in_features}"
            )

    @staticmethod
    def parse(text: str) -> "Pattern":
        """The pattern written as "N:M"; PatternError if the text is anything else."""
        match = re.fullmatch(r"\s*([0-9]{1,4}):([0-9]{1,4})\s*", text)
        if match is None:
            raise PatternError(f"{text!r} is not a pattern; write N:M, N weights kept of every M, as in 4:8")
        return Pattern(int(match[1]), int(match[2]))


PlanePattern = Pattern | Lattice
"""What a plane's groups can hold: N of M weights, or vectors of a lattice."""


def parse_patterns(text: str) -> tuple[PlanePattern, ...]:
    """The one to four planes written as "N:M+N:M…", or e8-BITS, as in 4:8+e8-8; PatternError otherwise."""
    patterns = tuple(
        Lattice.parse(part) if part.strip().startswith("e8") else Pattern.parse(part)
        for part in text.split("+")
    )
    if len(patterns) > MAX_PLANES:
        raise PatternError(f"{text!r} has {len(patterns)} planes; at most {MAX_PLANES} are supported")
    return patterns


def format_patterns(patterns: tuple[PlanePattern, ...]) -> str:
    """The inverse of `parse_patterns`: "4:8+2:8"."""
    return "+".join(str(pattern) for pattern in patterns)
