import pytest
import torch

from oracles import gptq_by_reinversion
from pbsp.binarization.rotation import rotate, rotate_moment, rotation_for, unrotate
from pbsp.errors import CalibrationError, ConfigError
from pbsp.methods.gptq import Gptq
from pbsp.quantization.ranges import searched_ranges
from pbsp.solver.hessian import damped, output_error


def problem(rows=8, columns=64, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    mix *= torch.rand(columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(tokens, columns, dtype=torch.float64, generator=generator) @ mix
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return weight, inputs.T @ inputs / tokens


def rounded_to_nearest(weight, bits, block):
    groups = [(part, searched_ranges(part, bits)) for part in weight.split(block, 1)]
    return torch.cat([ranges.values(ranges.codes(part)) for part, ranges in groups], 1)


@pytest.mark.parametrize(
    ("columns", "block"), [(1, 128), (20, 1), (20, 8), (20, 19), (20, 20), (20, 21), (150, 150), (150, 64)]
)
@pytest.mark.parametrize("bits", [1, 3])
def test_sweep_equals_reinversion_column_by_column(columns, block, bits):
    weight, moment = problem(rows=4, columns=columns)
    found = Gptq(bits, block).compress(weight, moment)
    expected = gptq_by_reinversion(weight, damped(moment, 0.01), bits, block, search=True)
    torch.testing.assert_close(found.dense().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_sweep_without_search_equals_reinversion(bits):
    weight, moment = problem(columns=40)
    found = Gptq(bits, 16, damping=0.1, search=False).compress(weight, moment)
    expected = gptq_by_reinversion(weight, damped(moment, 0.1), bits, 16, search=False)
    torch.testing.assert_close(found.dense().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [96, 30])
def test_rotated_it_is_the_same_fit_in_the_other_basis(columns):
    weight, moment = problem(columns=columns)
    size = rotation_for(columns, 64)
    found = Gptq(3, 32, rotation=64).compress(weight, moment)
    assert found.rotation == size
    turned = rotate_moment(moment.clone(), size)
    plain = Gptq(3, 32).compress(rotate(weight, size), turned)
    torch.testing.assert_close(found.dense(), unrotate(plain.dense(), size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_far_below_that_of_rounding_to_nearest(bits):
    weight, moment = problem(rows=64, columns=128)
    found = output_error(weight, Gptq(bits, 32).compress(weight, moment).dense(), moment)
    nearest = output_error(weight, rounded_to_nearest(weight, bits, 32), moment)
    assert found < 0.7 * nearest


def test_search_and_bits_lower_the_error():
    weight, moment = problem(rows=64, columns=128)
    errors = [
        output_error(weight, Gptq(bits, search=search).compress(weight, moment).dense(), moment)
        for bits, search in ((2, False), (2, True), (3, True), (4, True))
    ]
    assert errors == sorted(errors, reverse=True)


def test_last_group_of_a_row_may_be_shorter():
    weight, moment = problem(rows=3, columns=576, tokens=700)
    integers = Gptq(3).compress(weight.float(), moment.float())
    assert integers.scales.shape == integers.zeros.shape == (3, 5)
    assert output_error(weight, integers.dense(), moment) < 0.05


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_zero_rows_stay_zero(bits):
    weight, moment = problem()
    weight[2] = 0
    assert (Gptq(bits, 16).compress(weight, moment).dense()[2] == 0).all()


def test_pruned_weights_of_inputs_that_do_not_interact_stay_zero():
    weight, _ = problem()
    weight[:, ::2] = 0
    dense = Gptq(3, 16).compress(weight, torch.eye(64, dtype=torch.float64)).dense()
    assert (dense[:, ::2] == 0).all()


@pytest.mark.parametrize(
    "row", [[0.5] * 16, [-0.5] * 16, [1e4] + [1e-3] * 15, [1e-20] * 16, [0.0] * 15 + [2.0]]
)
def test_degenerate_rows_give_finite_results_that_help(row):
    weight = torch.tensor([row] * 3)
    dense = Gptq(2, 8).compress(weight, torch.eye(16)).dense()
    assert torch.isfinite(dense).all()
    assert output_error(weight, dense, torch.eye(16)) <= 1.0


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_moment_of_few_tokens_is_solved(tokens):
    weight, moment = problem(tokens=tokens)
    found = output_error(weight, Gptq(3).compress(weight, moment).dense(), moment)
    assert found < 0.01


def test_rows_are_independent_and_the_weight_is_left_alone():
    weight, moment = problem(rows=5)
    before = weight.clone()
    together = Gptq(2, 32).compress(weight, moment)
    assert torch.equal(weight, before)
    assert torch.equal(together.dense()[3:4], Gptq(2, 32).compress(weight[3:4], moment).dense())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": 9}, "between 1 and 8"),
        ({"block": 0}, "block is 0"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"damping": float("nan")}, "damping is nan"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Gptq(**fields)


def test_a_moment_that_is_not_finite_is_refused():
    weight, moment = problem()
    moment[0, 0] = float("nan")
    with pytest.raises(CalibrationError):
        Gptq().compress(weight, moment)
