import pytest
import torch

from pbsp.errors import PatternError
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import parse_patterns
from pbsp.storage.bits import nominal_bits, packed_shapes, predicted_bits, stored_bits
from random_planes import random_planes


@pytest.mark.parametrize("text", ["4:8", "4:8+2:8", "2:16+1:4+4:8+8:16"])
@pytest.mark.parametrize("scale_block", [1, 47, 48, 100])
def test_prediction_equals_the_bits_that_are_stored(text, scale_block):
    linear = PackedLinear.from_planes(random_planes(text, 5, 48, scale_block=scale_block))
    state = linear.state_dict()
    shapes = packed_shapes(parse_patterns(text), 5, 48, scale_block)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {**shapes}
    assert predicted_bits(parse_patterns(text), 5, 48, scale_block) == stored_bits(state.values())


def test_bits_of_a_large_layer_are_those_of_the_arithmetic():
    bits = predicted_bits(parse_patterns("4:8"), 1536, 576, 128)
    assert bits == 1536 * (576 * 11 // 8 + 5 * 8) + 8
    assert bits / (1536 * 576) == pytest.approx(1.375 + 5 * 8 / 576, abs=1e-4)


def test_row_padding_is_counted():
    assert predicted_bits(parse_patterns("4:16"), 1, 576, 576) == 68 * 8 + 8 + 8  # 540 code bits


def test_stored_bits_count_bytes_of_any_dtype():
    assert stored_bits([torch.zeros(3, dtype=torch.int8), torch.zeros(2, 2)]) == 24 + 128


def test_nominal_bits_add_up():
    assert nominal_bits(parse_patterns("4:8+2:8")) == 0.75


def test_shapes_of_a_pattern_that_does_not_tile_are_refused():
    with pytest.raises(PatternError, match="100"):
        packed_shapes(parse_patterns("4:8"), 10, 100, 128)
