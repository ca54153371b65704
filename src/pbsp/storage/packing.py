"""The signs of an N:M matrix as bytes, both directions and bit-exact; docs/format.md spells the codes out.

A group of M weights is one code of fixed width, rank(support)·2^N + signs; the codes of a row are a bit
stream (see `streams.py`).
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Int, Int8, Int64, UInt8
from torch import Tensor

from pbsp.errors import FormatError
from pbsp.pruning.lattice import Lattice, vector_keys
from pbsp.pruning.pattern import Pattern, PlanePattern
from pbsp.storage.streams import check_padding, join_bits, row_tiles, split_bits, stream_bytes

_TABLE_BYTES = 1 << 20  # the largest code table; beyond it codes are unranked arithmetically
_TILE_WEIGHTS = 1 << 20  # weights in flight, which bounds the int64 temporaries of ranking
_TILE_CODES = 1 << 17  # codes extracted at once: smaller tiles pay for calls, larger ones leave the cache
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def row_bytes(pattern: PlanePattern, in_features: int) -> int:
    """Bytes that the codes of a row take, padding included."""
    return stream_bytes(in_features // pattern.group, pattern.code_bits)


def pack_signs(signs: Int8[Tensor, "rows in"], pattern: PlanePattern) -> UInt8[Tensor, "rows bytes"]:
    """The code bytes of signs that are +1 or −1 at exactly N of every M weights and 0 elsewhere.

    For a lattice, of its vectors.
    """
    codes = _find(signs, pattern) if isinstance(pattern, Lattice) else _rank(signs, pattern)
    return join_bits(codes, pattern.code_bits)


def unpack_signs(
    codes: UInt8[Tensor, "rows bytes"], pattern: PlanePattern, in_features: int
) -> Int8[Tensor, "rows in"]:
    """The signs of the codes' rows; the codes must be valid (`check_codes`)."""
    signs = torch.empty(len(codes), in_features, dtype=torch.int8, device=codes.device)
    groups = in_features // pattern.group
    tabulated = pattern.code_count * pattern.group <= _TABLE_BYTES
    tile = _TILE_CODES if tabulated else _TILE_WEIGHTS // pattern.group
    for low, high in row_tiles(len(codes), groups, tile):
        code = split_bits(codes[low:high], pattern.code_bits, groups)
        if tabulated:
            table = _code_table(pattern, codes.device)
            signs[low:high] = table.index_select(0, code.reshape(-1)).view(torch.int8).view(high - low, -1)
        else:
            assert isinstance(pattern, Pattern), "lattices have few codes"
            signs[low:high] = _unrank(code, pattern).view(high - low, -1)
    return signs


def check_codes(
    codes: UInt8[Tensor, "rows bytes"], pattern: PlanePattern, in_features: int, name: str
) -> None:
    """Raise FormatError, with the name of what holds them, unless every code and padding bit is valid.

    Run once when a file is read: decoding trusts its input.
    """
    groups = in_features // pattern.group
    valid = pattern.code_count
    for low, high in row_tiles(len(codes), groups, _TILE_WEIGHTS):
        largest = int(split_bits(codes[low:high], pattern.code_bits, groups).max())
        if largest >= valid:
            raise FormatError(f"{name} holds code {largest}; pattern {pattern} has only {valid} codes")
    check_padding(codes, groups * pattern.code_bits, name)


def _find(vectors: Int8[Tensor, "rows in"], lattice: Lattice) -> Int64[Tensor, "rows groups"]:
    """Each group's place among the lattice's codes."""
    keys, order = _sorted_keys(lattice, vectors.device)
    codes = torch.empty(
        len(vectors), vectors.shape[1] // lattice.group, dtype=torch.int64, device=vectors.device
    )
    for low, high in row_tiles(len(vectors), vectors.shape[1], _TILE_WEIGHTS):
        wanted = vector_keys(vectors[low:high].reshape(high - low, -1, lattice.group))
        places = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        assert torch.equal(keys[places], wanted), f"a group is no code of {lattice}"
        codes[low:high] = order[places]
    return codes


@lru_cache(maxsize=16)
def _sorted_keys(lattice: Lattice, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys of all codes, ascending, and whose they are."""
    return vector_keys(lattice.codes(device)).sort()


@lru_cache(maxsize=64)
def _binomials(pattern: Pattern, device: torch.device) -> Int64[Tensor, "group kept_plus_one"]:
    """C(p, i) for every position p of a group and i up to N."""
    rows = [[math.comb(p, i) for i in range(pattern.kept + 1)] for p in range(pattern.group)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def support_ranks(signs: Int8[Tensor, "rows in"], pattern: Pattern) -> Int64[Tensor, "rows groups"]:
    """The colexicographic rank of each group's support, signs aside."""
    return _rank(signs, pattern) >> pattern.kept


def _rank(signs: Int8[Tensor, "rows in"], pattern: Pattern) -> Int64[Tensor, "rows groups"]:
    """Each group's code: the colexicographic rank of its support, then a bit per kept weight."""
    binomials = _binomials(pattern, signs.device)
    position = torch.arange(pattern.group, device=signs.device)
    codes = torch.empty(len(signs), signs.shape[1] // pattern.group, dtype=torch.int64, device=signs.device)
    for low, high in row_tiles(len(signs), signs.shape[1], _TILE_WEIGHTS):
        grouped = signs[low:high].view(high - low, -1, pattern.group)
        kept = grouped != 0
        order = kept.cumsum(-1)  # i + 1 at the kept position p_i
        assert bool((order[..., -1] == pattern.kept).all()), f"a group does not keep {pattern} weights"
        ranks = (binomials[position, order] * kept).sum(-1)
        bits = ((grouped > 0).long() << (order - 1).clamp_min(0)).sum(-1)
        codes[low:high] = (ranks << pattern.kept) + bits
    return codes


def _unrank(code: Int[Tensor, "rows groups"], pattern: Pattern) -> Int8[Tensor, "rows groups group"]:
    """The inverse of `_rank`, from the last position of the groups to the first."""
    binomials = _binomials(pattern, code.device)
    code = code.long()
    rank = code >> pattern.kept
    left = torch.full_like(code, pattern.kept)  # kept weights not yet placed
    signs = torch.zeros(*code.shape, pattern.group, dtype=torch.int8, device=code.device)
    for position in reversed(range(pattern.group)):
        combinations = binomials[position][left]
        kept = (left > 0) & (rank >= combinations)
        rank = torch.where(kept, rank - combinations, rank)
        left = left - kept.long()
        plus = (code >> left) & 1
        signs[..., position] = torch.where(kept, 2 * plus - 1, 0)
    return signs


@lru_cache(maxsize=64)
def _code_table(pattern: PlanePattern, device: torch.device) -> Int[Tensor, "codes words"]:
    """The signs of every code, as few wide words per code as M bytes allow: fewer elements to gather."""
    if isinstance(pattern, Lattice):
        signs = pattern.codes(device)
    else:
        codes = torch.arange(pattern.code_count, device=device)
        signs = _unrank(codes[:, None], pattern)[:, 0]
    width = math.gcd(pattern.group, 8)
    return signs.view(_WORDS[width]) if width > 1 else signs
