import pytest
import torch

from oracles import ranges_by_trying
from pbsp.quantization.integers import IntegerGroups
from pbsp.quantization.ranges import full_ranges, searched_ranges


def random_integers(rows, columns, *, width=3, block=128, rotation=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // block)
    return IntegerGroups(
        codes=torch.randint(0, 2**width, (rows, columns), generator=generator).to(torch.uint8),
        scales=torch.rand(rows, groups, generator=generator).half().float(),
        zeros=torch.randint(0, 2**width, (rows, groups), generator=generator).to(torch.uint8),
        width=width,
        block=block,
        rotation=rotation,
    )


@pytest.mark.parametrize("rotation", [1, 4])
def test_split_and_join_are_inverse_and_copy(rotation):
    integers = random_integers(6, 40, block=16, rotation=rotation)
    parts = integers.split([1, 3, 2])
    assert [len(part.codes) for part in parts] == [1, 3, 2]
    assert torch.equal(parts[1].dense(), integers.dense()[1:4])
    assert torch.equal(IntegerGroups.join(parts).dense(), integers.dense())
    assert torch.equal(IntegerGroups.join(parts[:1]).dense(), integers.dense()[:1])
    parts[0].codes.zero_()
    assert integers.codes[0].any()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("search", [True, False])
def test_ranges_equal_a_slow_loop_over_shrinks(width, search):
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(9, 40, dtype=torch.float64, generator=generator)
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2, 3] = 30.0
    ranges = (searched_ranges if search else full_ranges)(weight, width)
    expected = [ranges_by_trying(row, width, search=search)[:2] for row in weight.tolist()]
    assert list(zip(ranges.scales.tolist(), ranges.zeros.tolist(), strict=True)) == expected


def test_ranges_in_float32_are_as_good():
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(1))
    ranges = searched_ranges(weight, 3)
    errors = (ranges.values(ranges.codes(weight)) - weight).double().abs().pow(2.4).sum(1)
    least = [ranges_by_trying(row, 3, search=True)[2] for row in weight.tolist()]
    torch.testing.assert_close(errors, torch.tensor(least, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("find", [full_ranges, searched_ranges])
def test_zero_is_a_value_of_every_range(find):
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    weight[0] = weight[0].abs() + 5
    weight[:, ::3] = 0
    ranges = find(weight, 2)
    assert (ranges.values(ranges.codes(weight))[:, ::3] == 0).all()


@pytest.mark.parametrize("find", [full_ranges, searched_ranges])
@pytest.mark.parametrize("constant", [0.0, 1e-20, 0.7, -0.7, 3000.0])
def test_constant_rows_are_kept_to_the_precision_of_a_scale(find, constant):
    weight = torch.full((2, 8), constant)
    ranges = find(weight, 3)
    values = ranges.values(ranges.codes(weight))
    torch.testing.assert_close(values, weight, rtol=2**-11, atol=2**-24)


def test_an_outlier_beyond_float16_is_clipped_not_infinite():
    weight = torch.tensor([[1e9, 1.0, -1.0, 0.0]])
    ranges = searched_ranges(weight, 2)
    assert ranges.values(ranges.codes(weight)).tolist() == [[3 * 65504.0, 0.0, 0.0, 0.0]]
