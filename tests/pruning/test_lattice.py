from itertools import product

import pytest
import torch

from oracles import points_of_e8
from pbsp.config import Config
from pbsp.errors import ConfigError, FormatError, PatternError
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern, format_patterns, parse_patterns
from pbsp.storage.planes import PlanesForm

BITS = [8, 9, 10, 12]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_different_short_vectors_of_e8(bits):
    codes = Lattice(bits).codes().long()
    assert codes.shape == (1 << bits, 8)
    assert len(codes.unique(dim=0)) == 1 << bits
    odd = codes % 2
    assert (odd == odd[:, :1]).all()  # all entries whole, or all halves
    assert (codes.sum(1) % 4 == 0).all()
    assert torch.equal(codes[1 << (bits - 1) :], -codes[: 1 << (bits - 1)])
    norms = codes.square().sum(1)
    assert norms.max() <= 24


@pytest.mark.parametrize("bits", BITS)
def test_no_shorter_vector_is_left_out(bits):
    norms = Lattice(bits).codes().long().square().sum(1)
    sizes = {8: 240, 16: 2160, 24: 6720}  # of the shells, doubled vectors
    for norm, size in sizes.items():
        if norm < norms.max():
            assert int((norms == norm).sum()) == size


@pytest.mark.parametrize("bits", BITS)
def test_points_that_have_a_code_are_told_from_others(bits):
    points = torch.tensor(list(points_of_e8()))
    codes = {tuple(code) for code in Lattice(bits).codes().tolist()}
    expected = [tuple(point) in codes for point in points.tolist()]
    assert sum(expected) == 1 << bits
    assert Lattice(bits).holds(points.float()).tolist() == expected
    assert not Lattice(bits).holds(torch.full((1, 8), 2.0**21)).any()


def test_codes_hold_the_two_kinds_of_planes_that_the_lattice_joins():
    codes = {tuple(code) for code in Lattice(8).codes().tolist()}
    two = [code for code in codes if sorted(map(abs, code)) == [0] * 6 + [2] * 2]
    dense = [code for code in codes if set(map(abs, code)) == {1}]
    assert (len(two), len(dense)) == (112, 128)
    assert all(sum(entry < 0 for entry in code) % 2 == 0 for code in dense)


def test_vectors_do_not_depend_on_the_machine():
    assert Lattice(12).codes()[[0, 119, 120, 1000, 2047]].tolist() == [
        [1, -1, 1, 1, -1, 1, 1, 1],
        [1, 1, -1, -1, 1, -1, -1, 1],
        [0, -2, 0, 2, 2, 0, 2, 0],
        [-2, 2, 0, 2, 2, 0, 0, 0],
        [-2, 2, 0, -2, 2, -2, 2, 0],
    ]


@pytest.mark.parametrize("text", ["e8-8", "e8-12+e8-8", "4:8+e8-9", "e8-10+2:16"])
def test_planes_are_written_as_they_are_read(text):
    assert format_patterns(parse_patterns(text)) == text


@pytest.mark.parametrize("text", ["e8", "e8-", "e8-11", "e8-7", "e8-16", "e8-8:8", "e8-999"])
def test_what_is_no_code_of_e8_is_refused(text):
    with pytest.raises(PatternError, match="is not a code of E8"):
        parse_patterns(text)


def test_bits_are_those_of_the_codes():
    lattice = Lattice(12)
    assert (lattice.code_bits, lattice.bits_per_weight, lattice.nominal_bits) == (12, 1.5, 1.5)
    with pytest.raises(PatternError, match="does not tile a row of 100"):
        lattice.check(100)


@pytest.mark.parametrize("line", ["pbsp e8-8", "billm e8-8", "stbllm e8-8", "planes e8-8 allocation=paper"])
def test_methods_that_prune_refuse_a_lattice(line):
    with pytest.raises(ConfigError, match="N:M"):
        Config.parse(line)


def test_lattices_do_not_share_scales():
    with pytest.raises(FormatError, match="share scales"):
        PlanesForm((Pattern(1, 1), Lattice(8)), 64, 4, 64, shared_scales=True)


def test_codes_are_numbered_as_the_format_says():
    vectors = [*product(range(-4, 5, 2), repeat=8), *product(range(-3, 4, 2), repeat=8)]
    numbered = []
    for vector in vectors:
        length = sum(entry * entry for entry in vector)
        if sum(vector) % 4 == 0 and 0 < length <= 24:
            key = sum((entry + 4) * 9**place for place, entry in enumerate(vector))
            if key > sum((4 - entry) * 9**place for place, entry in enumerate(vector)):
                numbered.append((length, key * 0x9E3779B1 % 2**32, vector))
    assert len(numbered) == 9120 // 2
    expected = [list(vector) for _, _, vector in sorted(numbered)[:2048]]
    assert Lattice(12).codes()[:2048].tolist() == expected
