import pytest
import torch

from pbsp.errors import FormatError, PatternError
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import parse_patterns
from pbsp.storage.bits import stored_bits
from pbsp.storage.grouped import GroupedForm
from pbsp.storage.planes import PlanesForm
from random_grouped import random_grouped
from random_planes import random_planes


def planes_bits(text, rows, columns, scale_block):
    return sum(
        spec.bits for spec in PlanesForm(parse_patterns(text), columns, rows, scale_block).specs().values()
    )


def grouped_form(text, rows, columns, parts=1):
    return GroupedForm(parse_patterns(text), columns, rows, 128, parts)


@pytest.mark.parametrize("text", ["4:8", "4:8+2:8", "2:16+1:4+4:8+8:16"])
@pytest.mark.parametrize("scale_block", [1, 47, 48, 100])
def test_prediction_equals_the_bits_that_are_stored(text, scale_block):
    linear = PackedLinear.of(random_planes(text, 5, 48, scale_block=scale_block))
    assert_prediction(linear)


@pytest.mark.parametrize("text", ["1:1", "4:8", "4:16"])
@pytest.mark.parametrize(("block", "parts"), [(1, 1), (47, 2), (48, 6), (100, 3)])
def test_prediction_equals_the_bits_of_layout_paper(text, block, parts):
    assert_prediction(PackedLinear.of(random_grouped(text, 6, 48, block=block, parts=parts)))


def assert_prediction(linear):
    state, specs = linear.state_dict(), linear.form.specs()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert sum(spec.bits for spec in specs.values()) == stored_bits(state.values())


@pytest.mark.parametrize(
    ("text", "at_1536", "at_576"),
    [
        ("4:8", 3.5, 3.625),
        ("5:8", 3.75, 3.875),
        ("6:8", 4.0, 4.125),
        ("8:8", 4.125, 4.25),
    ],
)
def test_layout_paper_costs_what_the_arithmetic_says(text, at_1536, at_576):
    """576 columns have five blocks of 128, the last one half used."""
    for columns, bits_per_weight in ((1536, at_1536), (576, at_576)):
        specs = grouped_form(text, 1024, columns, parts=2).specs()
        bitmaps = specs.pop("weight_salient").bits
        assert bitmaps == 2 * columns
        assert sum(spec.bits for spec in specs.values()) == bits_per_weight * 1024 * columns


def test_nominal_bits_of_layout_paper_count_salient_columns_twice():
    matrix = random_grouped("4:8", 6, 48, parts=3, salient_share=0.3)
    packed = PackedLinear.of(matrix).packed
    share = sum(map(sum, matrix.salient.tolist())) / (3 * 48)
    assert 0 < share < 1
    assert packed.form.nominal_bits(packed.tensors().__getitem__) == pytest.approx((1 + share) / 2, rel=1e-15)


def test_bits_of_a_large_layer_are_those_of_the_arithmetic():
    bits = planes_bits("4:8", 1536, 576, 128)
    assert bits == 1536 * (576 * 11 // 8 + 5 * 8) + 8
    assert bits / (1536 * 576) == pytest.approx(1.375 + 5 * 8 / 576, abs=1e-4)


def test_row_padding_is_counted():
    assert planes_bits("4:16", 1, 576, 576) == 68 * 8 + 8 + 8  # 540 code bits


def test_stored_bits_count_bytes_of_any_dtype():
    assert stored_bits([torch.zeros(3, dtype=torch.int8), torch.zeros(2, 2)]) == 24 + 128


def test_nominal_bits_add_up():
    assert PlanesForm(parse_patterns("4:8+2:8"), 16, 1, 16).nominal_bits({}.__getitem__) == 0.75


def test_shapes_of_a_pattern_that_does_not_tile_are_refused():
    with pytest.raises(PatternError, match="100"):
        PlanesForm(parse_patterns("4:8"), 100, 10, 128)
    with pytest.raises(PatternError, match="100"):
        grouped_form("4:8", 10, 100)


def test_forms_of_layout_paper_that_cannot_be_are_refused():
    with pytest.raises(FormatError, match="one N:M, not 4:8\\+2:8"):
        grouped_form("4:8+2:8", 10, 96)
    with pytest.raises(FormatError, match="3 salient_parts do not divide 10 rows"):
        grouped_form("4:8", 10, 96, parts=3)
