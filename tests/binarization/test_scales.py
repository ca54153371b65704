import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import scale_by_integers
from pbsp.binarization.scales import decode_scales, encode_scales, round_scales, scale_offset, scale_offsets

CODES = torch.arange(256, dtype=torch.uint8)[None]
magnitudes = st.floats(2**-100, 2**100, width=32)


@pytest.mark.parametrize("offset", range(-126, 101))
def test_every_code_has_its_exact_value_and_comes_back(offset):
    decoded = decode_scales(CODES, offset)
    assert decoded[0].tolist() == [float(scale_by_integers(code, offset)) for code in range(256)]
    assert torch.equal(encode_scales(decoded, offset), CODES)


@given(st.lists(magnitudes, min_size=1, max_size=20))
def test_the_nearest_code_is_taken_and_the_largest_scale_does_not_overflow(values):
    scales = torch.tensor([values])
    offset = scale_offset(scales)
    table = torch.tensor([float(scale_by_integers(code, offset)) for code in range(256)]).double()
    error = (decode_scales(encode_scales(scales, offset), offset).double() - scales.double()).abs()
    nearest = (table[:, None] - scales.double()).abs().amin(0)
    assert torch.equal(error[0], nearest)
    largest = max(values)
    assert float(decode_scales(encode_scales(scales, offset), offset).max()) == pytest.approx(
        largest, rel=1 / 64
    )


@given(st.lists(magnitudes, min_size=1, max_size=20))
def test_rounding_twice_changes_nothing(values):
    rounded = round_scales(torch.tensor([[values]]))
    assert torch.equal(round_scales(rounded), rounded)
    assert torch.equal(scale_offsets(rounded), scale_offsets(torch.tensor([[values]])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_scales_are_exact_in_half_precision(dtype):
    rounded = round_scales(torch.rand(2, 5, 7) * 0.1)
    assert torch.equal(rounded.to(dtype).float(), rounded)


def test_zero_is_zero_and_planes_have_their_own_offsets():
    scales = torch.stack([torch.zeros(2, 3), torch.full((2, 3), 0.75), torch.full((2, 3), 3.0)])
    assert torch.equal(round_scales(scales), scales)
    offsets = scale_offsets(scales)
    assert offsets[2] - offsets[1] == 2


def test_values_beyond_the_range_are_clamped():
    assert encode_scales(torch.tensor([[4033.0, 1e6]]), 0).tolist() == [[255, 255]]
    assert encode_scales(torch.tensor([[-1.0, 0.49, 0.5, 1.5]]), 0).tolist() == [[0, 0, 0, 2]]
