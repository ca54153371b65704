import pytest
import torch

from pbsp.errors import CalibrationError, ConfigError
from pbsp.methods.nanoquant import Nanoquant
from pbsp.solver.hessian import output_error
from pbsp.storage.counting import count_bits
from random_low_rank import random_low_rank
from variants import layer_problem


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "dtype"),
    [(40, 40, 1, torch.float32), (96, 64, 4, torch.float32), (64, 96, 4, torch.float64)],
)
def test_a_planted_product_is_found_where_the_rank_suffices(rows, columns, rank, dtype, monkeypatch):
    monkeypatch.setattr(Nanoquant, "rank", lambda *_: rank)
    weight = random_low_rank(rows, columns, rank, seed=1).dense().to(dtype)
    moment = torch.eye(columns, dtype=dtype)
    # The ridge alone makes the scales 3 % too small; refitted, only float16 is left.
    for refits, bound in ((0, 1.2e-3), (2, 1e-6)):
        found = Nanoquant(refits=refits).compress(weight, moment)
        assert output_error(weight, found.dense().to(dtype), moment) < bound


def test_error_falls_as_bits_rise_and_with_refits():
    weight, moment = layer_problem(96, 64)
    errors = [
        output_error(weight, method.compress(weight, moment).dense(), moment)
        for method in (
            Nanoquant(0.7, 60),
            Nanoquant(1.0, 60),
            Nanoquant(2.0, 60),
            Nanoquant(2.0, 60, refits=3),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0] < 0.5


def test_inputs_that_are_larger_get_the_smaller_error():
    weight, _ = layer_problem(96, 64)
    moment = torch.diag(torch.where(torch.arange(64) < 32, 25.0, 1.0))
    residual = weight - Nanoquant(1.0, 60).compress(weight, moment).dense()
    assert residual[:, :32].square().mean() < 0.7 * residual[:, 32:].square().mean()


@pytest.mark.parametrize("bits", [0.63, 1.0, 1.37, 2.0])
def test_stored_bits_are_within_those_asked_for_and_no_rank_is_left_out(bits):
    weight, moment = layer_problem(96, 64)
    found = Nanoquant(bits, 2).compress(weight, moment)
    stored = count_bits(found)
    assert stored <= bits * weight.numel() < stored + 8 * sum(weight.shape)
    assert found.row_signs.shape[1] == Nanoquant(bits).rank(96, 64)


def test_rank_is_exact_where_bits_are():
    assert Nanoquant(24 * 2 / 64).rank(64, 64) == 8
    assert Nanoquant(1.0).rank(576, 576) == 272
    assert Nanoquant(1.0).rank(1536, 576) == 400


def test_a_layer_too_small_for_one_rank_is_refused_with_what_it_takes():
    with pytest.raises(ConfigError, match=r"bits is 1.0; rank 8 and the scales of 12 x 48 .* take 2.500$"):
        Nanoquant().compress(*layer_problem(12, 48))


@pytest.mark.parametrize("factor", [4.0, 2.0**-12])
def test_scaling_the_weight_scales_the_scales_alone(factor):
    weight, moment = layer_problem(96, 64)
    method = Nanoquant(1.0, 30)
    found, scaled = method.compress(weight, moment), method.compress(factor * weight, moment)
    assert torch.equal(scaled.row_signs, found.row_signs)
    assert torch.equal(scaled.column_signs, found.column_signs)
    torch.testing.assert_close(scaled.dense(), factor * found.dense(), rtol=4e-3, atol=0)


def test_scaling_the_moment_changes_nothing():
    weight, moment = layer_problem(96, 64)
    method = Nanoquant(1.0, 30, refits=1)
    assert torch.equal(method.compress(weight, 4 * moment).dense(), method.compress(weight, moment).dense())


def test_scales_are_balanced_and_what_float16_holds():
    found = Nanoquant(1.0, 30).compress(*layer_problem(96, 64))
    assert float(found.row_scales.norm()) == pytest.approx(float(found.column_scales.norm()), rel=1e-3)
    for scales in (found.row_scales, found.column_scales):
        assert torch.equal(scales.half().float(), scales)


def test_runs_repeat_seeds_differ_and_the_weight_is_left_alone():
    weight, moment = layer_problem(96, 64)
    before = weight.clone(), moment.clone()
    state = torch.get_rng_state()
    found = Nanoquant(1.0, 10).compress(weight, moment).dense()
    assert torch.equal(found, Nanoquant(1.0, 10).compress(weight, moment).dense())
    assert not torch.equal(found, Nanoquant(1.0, 10, seed=1).compress(weight, moment).dense())
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_of_zeros_and_inputs_that_are_never_active_are_solved():
    weight, moment = layer_problem(96, 64)
    assert (Nanoquant(1.0, 5, refits=1).compress(0 * weight, moment).dense() == 0).all()
    assert Nanoquant(1.0, 5, refits=1).compress(weight, 0 * moment).dense().isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.0}, "bits is 0.0"),
        ({"bits": float("nan")}, "bits is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"shrinkage": 1.1}, "shrinkage is 1.1"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"refits": -1}, "refits is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Nanoquant(**fields)


def test_a_moment_that_is_not_finite_is_refused():
    weight, moment = layer_problem(96, 64)
    moment[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        Nanoquant().compress(weight, moment)
