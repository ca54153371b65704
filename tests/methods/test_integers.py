import pytest
import torch

from oracles import rows_by_reinversion
from pbsp.binarization.rotation import rotate, rotate_moment, unrotate
from pbsp.errors import CalibrationError, ConfigError, PatternError
from pbsp.methods.integers import IntegerFit
from pbsp.quantization.rows import dequantize_rows, quantize_rows
from pbsp.solver.hessian import damped, output_error
from pbsp.storage.counting import count_bits
from variants import layer_problem


@pytest.mark.parametrize(("columns", "bits"), [(32, 4), (96, 4), (1, 8), (40, 8)])
def test_sweep_equals_reinversion_column_by_column(columns, bits):
    weight, moment = layer_problem(rows=4, columns=columns, dtype=torch.float64)
    found = IntegerFit(bits, rotation=1).compress(weight, moment)
    expected = rows_by_reinversion(weight, damped(moment, 0.01), bits)
    torch.testing.assert_close(found.dense().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_rotated_it_is_the_same_fit_in_the_other_basis(bits):
    weight, moment = layer_problem(rows=4, columns=96, dtype=torch.float64)
    found = IntegerFit(bits).compress(weight, moment)
    assert found.rotation == 16
    turned = rotate_moment(moment.clone(), 16)
    plain = IntegerFit(bits, rotation=1).compress(rotate(weight, 16), turned)
    torch.testing.assert_close(found.dense(), unrotate(plain.dense(), 16), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_output_error_is_far_below_that_of_rounding_to_nearest(bits):
    weight, moment = layer_problem(rows=64, columns=128)
    found = output_error(weight, IntegerFit(bits).compress(weight, moment).dense(), moment)
    nearest = output_error(weight, dequantize_rows(quantize_rows(weight, bits), bits), moment)
    assert found < 0.7 * nearest


def test_it_is_stored_in_half_a_bit_more_than_its_codes():
    weight, moment = layer_problem(rows=8, columns=64)
    assert count_bits(IntegerFit(4).compress(weight, moment)) == 4.5 * weight.numel()
    assert count_bits(IntegerFit(8).compress(weight, moment)) == (8 + 16 / 64) * weight.numel()


def test_bad_settings_and_moments_are_refused():
    with pytest.raises(ConfigError, match="bits is 3; integers have 4 or 8"):
        IntegerFit(3)
    with pytest.raises(ConfigError, match="damping is -1"):
        IntegerFit(damping=-1.0)
    weight, moment = layer_problem(columns=48)
    with pytest.raises(PatternError, match="48 weights are not whole groups of 32"):
        IntegerFit(4).compress(weight, moment)
    with pytest.raises(CalibrationError):
        IntegerFit(8).compress(weight, moment * float("nan"))
