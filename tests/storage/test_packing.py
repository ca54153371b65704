import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import code_bytes_by_integers
from pbsp.binarization.planes import Planes
from pbsp.errors import FormatError, PatternError
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern, parse_patterns
from pbsp.storage.checkpoint import LayerEntry, packed_digest
from pbsp.storage.packing import row_bytes, unpack_signs
from pbsp.storage.planes import pack_planes
from random_planes import random_planes, random_signs

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
PATTERNS = [
    "1:1",
    "1:2",
    "1:8",
    "2:16",
    "1:4",
    "2:8",
    "4:16",
    "8:8",
    "3:8",
    "2:4",
    "4:8",
    "6:8",
    "8:16",
    "3:7",
]
WIDE = ["3:7", "31:31", "16:20", "5:24", "1:64", "2:100"]


def assert_round_trip(planes: Planes) -> None:
    packed = pack_planes(planes)
    packed.check()
    back = packed.unpack()
    assert back.patterns == planes.patterns
    assert back.scale_block == planes.scale_block
    assert torch.equal(back.signs, planes.signs)
    assert torch.equal(back.scales, planes.scales)


@pytest.mark.parametrize("text", [*PATTERNS, *WIDE, "e8-8", "e8-9", "e8-10", "e8-12"])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 7), (2, 8), (5, 9), (1, 16)])
def test_every_pattern_comes_back_bit_for_bit(text, rows, groups):
    columns = groups * parse_patterns(text)[0].group
    for scale_block in (1, 5, columns, columns + 1):
        assert_round_trip(random_planes(text, rows, columns, scale_block=scale_block, seed=rows))


@pytest.mark.parametrize("bits", [8, 9, 10, 12])
def test_a_code_of_a_lattice_is_its_vectors_place(bits):
    lattice = Lattice(bits)
    planes = Planes((lattice,), lattice.codes().view(1, 4, -1), torch.zeros(1, 4, 1), 1 << (bits + 1))
    packed = pack_planes(planes)
    for row, stored in enumerate(packed.codes):
        number = int.from_bytes(bytes(stored.tolist()), "little")
        codes = [number >> bits * place & (1 << bits) - 1 for place in range(1 << (bits - 2))]
        assert codes == list(range(row << (bits - 2), (row + 1) << (bits - 2)))


def test_what_is_no_vector_of_the_lattice_is_not_packed():
    signs = torch.tensor([[[1, 1, 1, 1, 1, 1, 1, -1]]], dtype=torch.int8)  # their sum is no multiple of 4
    with pytest.raises(AssertionError, match="no code of e8-8"):
        pack_planes(Planes((Lattice(8),), signs, torch.zeros(1, 1, 1), 8))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes_and_plane_counts_come_back(data):
    groups = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (4, 8), (2, 8), (4, 16), (7, 16)])
    patterns = data.draw(st.lists(groups, min_size=1, max_size=4))
    columns = 16 * data.draw(st.integers(1, 5))
    planes = random_planes(
        "+".join(f"{kept}:{group}" for kept, group in patterns),
        data.draw(st.integers(1, 9)),
        columns,
        scale_block=data.draw(st.integers(1, columns)),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_round_trip(planes)


@pytest.mark.parametrize("text", [*PATTERNS, "1:64", "16:20"])
def test_bytes_are_those_of_big_integers(text):
    pattern = Pattern.parse(text)
    for groups in (1, 7, 8, 9):
        signs = random_signs(pattern, 3, groups * pattern.group, seed=groups)
        planes = Planes((pattern,), signs[None], torch.zeros(1, 3, 1), signs.shape[1])
        packed = pack_planes(planes)
        assert [bytes(row.tolist()) for row in packed.codes] == code_bytes_by_integers(signs, pattern)
        assert packed.codes.shape[1] == row_bytes(pattern, signs.shape[1])


@pytest.mark.parametrize("text", ["1:4", "2:4", "4:8", "3:7", "4:16"])
def test_all_codes_of_a_pattern_are_distinct_and_round_trip(text):
    pattern = Pattern.parse(text)
    codes = pattern.code_count
    stream = [code.to_bytes(row_bytes(pattern, pattern.group), "little") for code in range(codes)]
    signs = unpack_signs(
        torch.tensor([list(row) for row in stream], dtype=torch.uint8), pattern, pattern.group
    )
    assert len(set(map(tuple, signs.tolist()))) == codes
    assert (signs != 0).sum(1).eq(pattern.kept).all()
    assert code_bytes_by_integers(signs, pattern) == stream


def test_tables_and_arithmetic_decode_alike(monkeypatch):
    planes = random_planes("4:8", 37, 72)
    packed = pack_planes(planes)
    monkeypatch.setattr("pbsp.storage.packing._TABLE_BYTES", 0)
    monkeypatch.setattr("pbsp.storage.packing._TILE_WEIGHTS", 200)
    assert torch.equal(packed.unpack().signs, planes.signs)


def test_tiles_do_not_show_in_the_bytes(monkeypatch):
    planes = random_planes("4:8+3:8", 37, 72)
    packed = pack_planes(planes)
    monkeypatch.setattr("pbsp.storage.packing._TILE_WEIGHTS", 200)
    monkeypatch.setattr("pbsp.storage.packing._TILE_CODES", 20)
    assert torch.equal(pack_planes(planes).codes, packed.codes)
    assert torch.equal(packed.unpack().signs, planes.signs)


def test_any_range_of_rows_decodes_on_its_own():
    planes = random_planes("4:8+2:8", 9, 48, scale_block=20)
    part = pack_planes(planes).rows(4, 7).unpack()
    assert torch.equal(part.signs, planes.signs[:, 4:7])
    assert torch.equal(part.scales, planes.scales[:, 4:7])


@pytest.mark.parametrize("text", ["4:8", "8:16", "1:3"])
def test_a_rank_beyond_the_last_support_is_refused(text):
    pattern = Pattern.parse(text)
    packed = pack_planes(random_planes(text, 3, 8 * pattern.group))
    first_invalid = pattern.code_count
    assert first_invalid < 1 << pattern.code_bits
    row = first_invalid << 7 * pattern.code_bits  # as the eighth code of the last row
    packed.codes[2] = torch.tensor(list(row.to_bytes(pattern.code_bits, "little")), dtype=torch.uint8)
    with pytest.raises(FormatError, match=f"plane 0 holds code {first_invalid}; pattern {pattern}"):
        packed.check()


@pytest.mark.parametrize("plane", [0, 1])
def test_set_padding_bits_are_refused(plane):
    packed = pack_planes(random_planes("4:8+2:8", 3, 24))  # 33 of 40 bits, 21 of 24
    column = (5, 8)[plane] - 1
    packed.codes[1, column] |= 128
    with pytest.raises(FormatError, match=f"plane {plane} has set bits in the padding"):
        packed.check()


def test_a_scale_offset_beyond_float32_is_refused():
    packed = pack_planes(random_planes("4:8", 3, 24))
    with pytest.raises(FormatError, match="offset 127"):
        replace(packed, offsets=torch.tensor([127], dtype=torch.int8)).check()


def test_scales_that_were_not_rounded_are_our_own_bug():
    planes = random_planes("4:8", 3, 24)
    with pytest.raises(AssertionError):
        pack_planes(replace(planes, scales=planes.scales * 1.0001))


def test_planes_that_keep_another_number_are_our_own_bug():
    planes = random_planes("4:8", 3, 24)
    with pytest.raises(AssertionError, match="4:8"):
        pack_planes(replace(planes, signs=torch.ones_like(planes.signs)))


def test_a_pattern_that_does_not_tile_is_refused():
    planes = random_planes("4:8", 3, 24)
    with pytest.raises(PatternError, match="left over"):
        pack_planes(replace(planes, patterns=(Pattern(4, 16),)))


def test_the_worked_matrix_of_the_documentation_has_the_bytes_printed_there():
    text = FORMAT.read_text(encoding="utf-8").partition("### A worked matrix\n")[2].partition("\n## ")[0]
    symbols = {"+": 1, "-": -1, ".": 0}
    rows = [[symbols[c] for c in row if c in symbols] for row in re.findall(r"^row \d:(.*)$", text, re.M)]
    signs = torch.tensor(rows, dtype=torch.int8)
    scales = [float(number) for number in re.search(r"scales ([\d.]+) and ([\d.]+) the", text).groups()]
    packed = pack_planes(Planes((Pattern(2, 8),), signs[None], torch.tensor(scales).view(1, 2, 1), 16))
    printed = dict(re.findall(r"^(weight\w*)  +(.*)$", text, re.M))
    assert printed["weight"] == " | ".join(bytes(row.tolist()).hex(" ") for row in packed.codes)
    assert printed["weight_scale"] == " | ".join(bytes(row.tolist()).hex(" ") for row in packed.scales)
    assert printed["weight_scale_offset"] == " ".join(map(str, packed.offsets.tolist()))


def test_rotated_planes_say_so_in_their_entry_and_digest():
    planes = random_planes("4:8", 7, 96)
    turned = pack_planes(replace(planes, rotation=16))
    entry = LayerEntry(turned.form, False, packed_digest(turned))
    assert entry.to_dict()["rotation"] == 16
    assert LayerEntry.from_dict("a", entry.to_dict()) == entry
    plain = pack_planes(planes)
    assert "rotation" not in LayerEntry(plain.form, False, "").to_dict()
    assert packed_digest(plain) != entry.sha256
    for size, message in (
        (64, "rows of 96 weights have no rotation of size 64"),
        (3, "no rotation of size 3"),
    ):
        with pytest.raises(FormatError, match=message):
            LayerEntry.from_dict("a", {**entry.to_dict(), "rotation": size})
