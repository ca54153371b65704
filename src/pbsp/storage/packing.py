"""Planes as bytes, both directions and bit-exact; docs/format.md spells the layout out.

A group of M weights is one code of fixed width, rank(support)·2^N + signs. The codes of a row follow
each other LSB-first and every plane's row is padded with zero bits to a whole byte, so eight codes
take exactly `width` bytes and any range of rows can be decoded on its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int, Int8, Int32, Int64, UInt8
from torch import Tensor

from pbsp.binarization.planes import Planes, block_count
from pbsp.binarization.scales import decode_scales, encode_scales, scale_offsets
from pbsp.errors import FormatError
from pbsp.pruning.pattern import Pattern

_TABLE_BYTES = 1 << 20  # the largest code table; beyond it codes are unranked arithmetically
_TILE_WEIGHTS = 1 << 20  # weights in flight, which bounds the int64 temporaries of ranking
_TILE_CODES = 1 << 17  # codes extracted at once: smaller tiles pay for calls, larger ones leave the cache
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class PackedPlanes:
    """The stored form of `Planes`.

    Attributes:
        patterns: N:M of each plane.
        in_features: weights per row.
        scale_block: columns that share a scale.
        codes: per row, the padded code bytes of plane 0, then plane 1…
        scales: per row, the E3M5 codes of plane 0's blocks, then plane 1's…
        offsets: exponent offset of each plane's scales.
    """

    patterns: tuple[Pattern, ...]
    in_features: int
    scale_block: int
    codes: UInt8[Tensor, "out row_bytes"]
    scales: UInt8[Tensor, "out plane_blocks"]
    offsets: Int8[Tensor, "planes"]

    def rows(self, low: int, high: int) -> "PackedPlanes":
        """The same matrix cut to rows low…high, without a copy."""
        return PackedPlanes(
            self.patterns,
            self.in_features,
            self.scale_block,
            self.codes[low:high],
            self.scales[low:high],
            self.offsets,
        )


def row_bytes(pattern: Pattern, in_features: int) -> int:
    """Bytes that one plane's codes take in a row, padding included."""
    return -(-in_features // pattern.group * pattern.code_bits // 8)


def pack_planes(planes: Planes) -> PackedPlanes:
    """The stored bytes of `planes`; `unpack_planes` gives back the same signs and scales.

    Raises:
        PatternError: a pattern does not tile the rows.
    """
    in_features = planes.signs.shape[2]
    codes = []
    for pattern, signs in zip(planes.patterns, planes.signs, strict=True):
        pattern.check(in_features)
        codes.append(_join_codes(_rank(signs, pattern), pattern))
    offsets = scale_offsets(planes.scales)
    scales = [
        encode_scales(plane, offset) for plane, offset in zip(planes.scales, offsets.tolist(), strict=True)
    ]
    decoded = [decode_scales(plane, offset) for plane, offset in zip(scales, offsets.tolist(), strict=True)]
    assert torch.equal(torch.stack(decoded), planes.scales), "scales were not rounded to the stored format"
    return PackedPlanes(
        planes.patterns,
        in_features,
        planes.scale_block,
        torch.cat(codes, 1),
        torch.cat(scales, 1),
        offsets.to(planes.signs.device),
    )


def unpack_planes(packed: PackedPlanes) -> Planes:
    """The planes that `packed` stores; float32 scales, exact."""
    blocks = block_count(packed.in_features, packed.scale_block)
    scales = [
        decode_scales(codes, offset)
        for codes, offset in zip(packed.scales.split(blocks, 1), packed.offsets.tolist(), strict=True)
    ]
    signs = [
        unpack_signs(codes, pattern, packed.in_features)
        for codes, pattern in zip(split_planes(packed), packed.patterns, strict=True)
    ]
    return Planes(packed.patterns, torch.stack(signs), torch.stack(scales), packed.scale_block)


def split_planes(packed: PackedPlanes) -> tuple[UInt8[Tensor, "out _"], ...]:
    """Each plane's columns of `packed.codes`."""
    return packed.codes.split([row_bytes(pattern, packed.in_features) for pattern in packed.patterns], 1)


def unpack_signs(
    codes: UInt8[Tensor, "rows bytes"], pattern: Pattern, in_features: int
) -> Int8[Tensor, "rows in"]:
    """The signs of one plane's rows; the codes must be valid (`check_packed`)."""
    signs = torch.empty(len(codes), in_features, dtype=torch.int8, device=codes.device)
    groups = in_features // pattern.group
    tabulated = (pattern.supports << pattern.kept) * pattern.group <= _TABLE_BYTES
    tile = _TILE_CODES if tabulated else _TILE_WEIGHTS // pattern.group
    for low, high in _row_tiles(len(codes), groups, tile):
        code = _split_codes(codes[low:high], pattern, groups)
        if tabulated:
            table = _code_table(pattern, codes.device)
            signs[low:high] = table.index_select(0, code.reshape(-1)).view(torch.int8).view(high - low, -1)
        else:
            signs[low:high] = _unrank(code, pattern).view(high - low, -1)
    return signs


def check_packed(packed: PackedPlanes) -> None:
    """Raise FormatError unless every code, padding bit and scale of `packed` has a meaning.

    Shapes and dtypes must have been checked. Run once when a file is read: decoding trusts its input.
    """
    for number, (codes, pattern) in enumerate(zip(split_planes(packed), packed.patterns, strict=True)):
        groups = packed.in_features // pattern.group
        valid = pattern.supports << pattern.kept
        for low, high in _row_tiles(len(codes), groups, _TILE_WEIGHTS):
            largest = int(_split_codes(codes[low:high], pattern, groups).max())
            if largest >= valid:
                raise FormatError(
                    f"plane {number} holds code {largest}; pattern {pattern} has only {valid} codes"
                )
        used_bits = groups * pattern.code_bits % 8
        if used_bits and bool((codes[:, -1] >> used_bits).any()):
            raise FormatError(f"plane {number} has set bits in the padding of a row, which must be zero")
    for number, offset in enumerate(packed.offsets.tolist()):
        largest = decode_scales(torch.full((1, 1), 255, dtype=torch.uint8), offset)
        if not bool(torch.isfinite(largest)):
            raise FormatError(f"plane {number} has scale offset {offset}: its scales exceed float32")


def _row_tiles(rows: int, row_items: int, tile_items: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold about `tile_items` items each."""
    step = max(1, tile_items // row_items)
    return ((low, min(low + step, rows)) for low in range(0, rows, step))


@lru_cache(maxsize=64)
def _binomials(pattern: Pattern, device: torch.device) -> Int64[Tensor, "group kept_plus_one"]:
    """C(p, i) for every position p of a group and i up to N."""
    rows = [[math.comb(p, i) for i in range(pattern.kept + 1)] for p in range(pattern.group)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _rank(signs: Int8[Tensor, "rows in"], pattern: Pattern) -> Int64[Tensor, "rows groups"]:
    """Each group's code: the colexicographic rank of its support, then a bit per kept weight."""
    binomials = _binomials(pattern, signs.device)
    position = torch.arange(pattern.group, device=signs.device)
    codes = torch.empty(len(signs), signs.shape[1] // pattern.group, dtype=torch.int64, device=signs.device)
    for low, high in _row_tiles(len(signs), signs.shape[1], _TILE_WEIGHTS):
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
def _code_table(pattern: Pattern, device: torch.device) -> Int[Tensor, "codes words"]:
    """The signs of every code, as few wide words per code as M bytes allow: fewer elements to gather."""
    codes = torch.arange(pattern.supports << pattern.kept, device=device)
    signs = _unrank(codes[:, None], pattern)[:, 0]
    width = math.gcd(pattern.group, 8)
    return signs.view(_WORDS[width]) if width > 1 else signs


def _join_codes(codes: Int64[Tensor, "rows groups"], pattern: Pattern) -> UInt8[Tensor, "rows bytes"]:
    """Fixed-width codes as a row's bit stream, LSB-first."""
    rows, groups = codes.shape
    width = pattern.code_bits
    runs = -(-groups // 8)
    padded = torch.nn.functional.pad(codes, (0, runs * 8 - groups)).view(rows, runs, 8)
    stream = torch.zeros(rows, runs, width, dtype=torch.uint8, device=codes.device)
    for number in range(8):
        first, shift = divmod(number * width, 8)
        shifted = padded[..., number] << shift
        for byte in range(first, (number * width + width - 1) // 8 + 1):
            stream[..., byte] |= ((shifted >> 8 * (byte - first)) & 255).to(torch.uint8)
    return stream.view(rows, -1)[:, : row_bytes(pattern, groups * pattern.group)]


def _split_codes(
    codes: UInt8[Tensor, "rows bytes"], pattern: Pattern, groups: int
) -> Int32[Tensor, "rows groups"]:
    """The inverse of `_join_codes`. Bytes are transposed first, so that all arithmetic is contiguous."""
    width = pattern.code_bits
    runs = -(-groups // 8)
    padding = runs * width - codes.shape[1]
    whole = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
    stream = whole.reshape(-1, width).T.to(torch.int32).contiguous()
    result = torch.empty(stream.shape[1], 8, dtype=torch.int32, device=codes.device)
    for number in range(8):
        first, shift = divmod(number * width, 8)
        code = stream[first] >> shift
        for byte in range(first + 1, (number * width + width - 1) // 8 + 1):
            # A fifth byte reaches beyond bit 31 only with bits above the code's width, masked below.
            code |= stream[byte] << (8 * (byte - first) - shift)
        result[:, number] = code
    result &= (1 << width) - 1
    return result.view(len(codes), -1)[:, :groups]
