import pytest
import torch

from oracles import rows_by_reinversion
from pbsp.binarization.planes import expand_scales
from pbsp.binarization.refinement import descend_integers
from pbsp.binarization.rotation import rotate, rotate_moment, unrotate
from pbsp.errors import CalibrationError, ConfigError
from pbsp.methods.integers import IntegerFit, integer_planes, rounded_rows
from pbsp.quantization.rows import dequantize_rows
from pbsp.solver.hessian import damped, inverse_factor, output_error
from pbsp.storage.counting import count_bits
from pbsp.storage.layouts import pack
from variants import layer_problem

ALL = (2, 3, 4, 8)


@pytest.mark.parametrize(("columns", "bits"), [(32, 4), (96, 4), (1, 8), (40, 8)])
def test_rows_rounded_in_turn_equal_reinversion_column_by_column(columns, bits):
    weight, moment = layer_problem(rows=4, columns=columns, dtype=torch.float64)
    hessian = damped(moment, 0.01)
    found = dequantize_rows(rounded_rows(weight, inverse_factor(hessian), bits), bits)
    torch.testing.assert_close(found.double(), rows_by_reinversion(weight, hessian, bits), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", ALL)
def test_rotated_it_is_the_same_fit_in_the_other_basis(bits):
    weight, moment = layer_problem(rows=4, columns=96, dtype=torch.float64)
    found = IntegerFit(bits).compress(weight, moment)
    assert found.rotation == 16
    turned = rotate_moment(moment.clone(), 16)
    plain = IntegerFit(bits, rotation=1).compress(rotate(weight, 16), turned)
    torch.testing.assert_close(found.dense(), unrotate(plain.dense(), 16), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", ALL)
def test_output_error_is_far_below_that_of_rounding_to_nearest(bits):
    weight, moment = layer_problem(rows=64, columns=128)
    found = output_error(weight, IntegerFit(bits).compress(weight, moment).dense(), moment)
    nearest = IntegerFit(bits, sweeps=0, rotation=1).compress(weight, torch.eye(128)).dense()
    assert found < 0.7 * output_error(weight, nearest, moment)


def test_errors_fall_with_bits_and_with_sweeps():
    weight, moment = layer_problem(rows=64, columns=128)
    fits = [IntegerFit(2, sweeps=0), *(IntegerFit(bits) for bits in ALL)]
    errors = [output_error(weight, fit.compress(weight, moment).dense(), moment) for fit in fits]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_odd_steps_that_are_stored_once(bits):
    weight, moment = layer_problem(rows=8, columns=200)
    found = IntegerFit(bits, block=64, rotation=1).compress(weight, moment)
    steps = expand_scales(found.scales[-1], 64, 200)
    integers = (found.dense() / steps).round()
    assert torch.equal(integers * steps, found.dense())
    assert set(integers.unique().tolist()) <= set(range(1 - 2**bits, 2**bits, 2))
    packed = pack(found)
    assert packed.form.label == f"{bits} bit"
    assert count_bits(found) == 8 * (bits * 200 + 8 * 4) + 8
    assert torch.equal(packed.decode(), found.dense())
    assert torch.equal(packed.unpack().scales, found.scales)


def test_the_planes_of_integers_are_their_bits():
    integers = torch.tensor([[-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0]])
    planes = integer_planes(integers, 3)
    assert planes[:, 0].T.tolist() == [[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]
    assert torch.equal(4 * planes[0] + 2 * planes[1] + planes[2], integers.to(torch.int8))


def test_a_sweep_of_descent_takes_the_best_integer_of_every_column_in_turn():
    weight, moment = layer_problem(rows=3, columns=140, dtype=torch.float64)
    hessian = damped(moment, 0.01)
    generator = torch.Generator().manual_seed(0)
    integers = 2.0 * torch.randint(0, 4, (3, 140), generator=generator).double() - 3
    steps = torch.tensor([[0.5, 0.3, 0.4], [0.2, 0.0, 0.3], [0.9, 0.4, 0.6]], dtype=torch.float64)
    wide = expand_scales(steps, 60, 140)

    def losses(values):
        residual = weight - values * wide
        return ((residual @ hessian) * residual).sum(1)

    expected = integers.clone()
    for column in range(140):  # slow, from the definition
        tried = []
        for level in (-3.0, -1.0, 1.0, 3.0):
            changed = expected.clone()
            changed[:, column] = level
            tried.append(losses(changed))
        best = torch.stack(tried).argmin(0) * 2.0 - 3
        expected[:, column] = torch.where(wide[:, column] > 0, best, expected[:, column])
    found = descend_integers(weight, integers, steps, hessian, largest=3, scale_block=60)
    assert torch.equal(found, expected)


def test_eight_bits_have_a_scale_a_row():
    weight, moment = layer_problem(rows=8, columns=64)
    assert count_bits(IntegerFit(8).compress(weight, moment)) == (8 + 16 / 64) * weight.numel()


def test_inputs_that_are_never_active_and_weights_of_zeros_are_solved():
    weight, moment = layer_problem(rows=8, columns=64)
    for bits in ALL:
        assert (IntegerFit(bits).compress(0 * weight, moment).dense() == 0).all()
        assert IntegerFit(bits).compress(weight, 0 * moment).dense().isfinite().all()


def test_bad_settings_and_moments_are_refused():
    with pytest.raises(ConfigError, match="bits is 5; integers have 2, 3, 4 or 8"):
        IntegerFit(5)
    with pytest.raises(ConfigError, match="damping is -1"):
        IntegerFit(damping=-1.0)
    with pytest.raises(ConfigError, match="sweeps is -1"):
        IntegerFit(sweeps=-1)
    weight, moment = layer_problem(columns=48)
    for bits in (3, 8):
        with pytest.raises(CalibrationError):
            IntegerFit(bits).compress(weight, moment * float("nan"))
