import pytest
import torch

from oracles import (
    binary_factors_by_inversion,
    column_scales_by_regression,
    ridge_regression_by_rows,
    row_scales_by_regression,
    signed_rank_one_by_svd,
)
from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.low_rank_fit import (
    Side,
    fit_sides,
    latent_update,
    mean_scales,
    project,
    refit_column_scales,
    refit_row_scales,
)
from pbsp.errors import CalibrationError, ConfigError
from random_low_rank import random_low_rank


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_split_and_join_are_inverse_and_copy():
    matrix = random_low_rank(6, 10, 4)
    parts = matrix.split([1, 3, 2])
    assert torch.equal(parts[1].dense(), matrix.dense()[1:4])
    assert torch.equal(LowRankBinary.join(parts).dense(), matrix.dense())
    parts[0].row_signs.zero_()
    parts[0].column_signs.zero_()
    assert torch.equal(matrix.dense(), random_low_rank(6, 10, 4).dense())


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_were_factorized_apart_are_not_joined(seed):
    first, other = random_low_rank(6, 10, 4), random_low_rank(6, 10, 4, seed=seed)
    if seed == 0:  # the same signs, other scales
        other.column_scales.mul_(2)
    with pytest.raises(ConfigError, match=r"moments of their own.*use weighting plain"):
        LowRankBinary.join([first, other])


def test_nominal_bits_are_the_signs():
    assert random_low_rank(6, 10, 4).nominal_bits == 4 * 16 / 60


@pytest.mark.parametrize("penalty", [0.0, 0.4])
@pytest.mark.parametrize("rank", [1, 7, 12])
def test_latents_solve_the_ridge_regression_of_every_row(penalty, rank):
    target, regressors, anchor = normal(5, 9), normal(9, rank, seed=1), normal(5, rank, seed=2)
    found = latent_update(target, regressors, anchor, penalty=penalty, ridge=0.03)
    expected = ridge_regression_by_rows(target, regressors, anchor, penalty, 0.03)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_singular_least_squares_step_names_the_ridge():
    same = torch.ones(9, 3, dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"singular at ridge 0\.0; raise the ridge"):
        latent_update(normal(5, 9), same, normal(5, 3), penalty=0.0, ridge=0.0)


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (1, 6), (6, 1), (40, 12)])
def test_projection_keeps_signs_and_the_leading_magnitudes(rows, rank):
    matrix = normal(rows, rank)
    matrix[0, 0] = 0
    # The power steps leave a few parts in ten thousand of the other singular vectors.
    torch.testing.assert_close(project(matrix), signed_rank_one_by_svd(matrix), rtol=1e-2, atol=1e-3)


def test_projection_leaves_what_is_allowed_and_zeros_as_they_are():
    allowed = normal(8, 5).sign() * torch.outer(normal(8, seed=1).abs(), normal(5, seed=2).abs())
    torch.testing.assert_close(project(allowed), allowed)
    assert (project(torch.zeros(3, 2)) == 0).all()


@pytest.mark.parametrize(("rows", "columns", "rank"), [(14, 9, 5), (6, 9, 11)])
@pytest.mark.parametrize("iterations", [1, 6])
def test_alternating_directions_equal_the_equations_written_out(rows, columns, rank, iterations, monkeypatch):
    monkeypatch.setattr("pbsp.binarization.low_rank_fit._POWER_STEPS", 200)
    target, latents = normal(rows, columns), (normal(rows, rank, seed=1), normal(columns, rank, seed=2))
    sides = Side.start(latents[0]), Side.start(latents[1])
    found = fit_sides(target, sides, iterations=iterations, ridge=0.03)
    expected = binary_factors_by_inversion(target, latents, iterations, 0.03)
    for side, consensus in zip(found, expected, strict=True):
        torch.testing.assert_close(side.consensus, consensus, rtol=1e-7, atol=1e-7)


def test_rows_in_another_order_give_factors_in_that_order():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    target, rows, columns = normal(12, 9), normal(12, 4, seed=1), Side.start(normal(9, 4, seed=2))
    found = fit_sides(target, (Side.start(rows), columns), iterations=20, ridge=0.03)
    moved = fit_sides(target[order], (Side.start(rows[order]), columns), iterations=20, ridge=0.03)
    torch.testing.assert_close(moved[0].consensus, found[0].consensus[order])
    torch.testing.assert_close(moved[1].consensus, found[1].consensus)
    assert not torch.allclose(moved[0].consensus, found[0].consensus)


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (5, 7)])
def test_mean_scales_rebuild_a_product_of_equal_components(rows, columns):
    """Each side bears the product's size, as it does at a fixed point of the alternation."""
    row_scales, column_scales = normal(rows).abs(), normal(columns, seed=1).abs()
    signs = normal(rows, 3, seed=2).sign(), normal(columns, 3, seed=3).sign()
    size = 4.2
    sides = (
        signs[0] * (size * row_scales / row_scales.norm())[:, None],
        signs[1] * (size * column_scales / column_scales.norm())[:, None],
    )
    found = mean_scales(*sides)
    expected = size * torch.outer(row_scales / row_scales.norm(), column_scales / column_scales.norm())
    torch.testing.assert_close(torch.outer(*found), expected)


def scale_problem():
    inputs = normal(200, 9) @ normal(9, 9, seed=1)
    matrix = random_low_rank(6, 9, 5)
    return normal(6, 9, seed=2), matrix, inputs, inputs.T @ inputs / len(inputs)


def test_refitted_scales_are_those_of_regressions_on_the_inputs():
    weight, matrix, inputs, moment = scale_problem()
    sums, given = matrix.sums().double(), (matrix.row_scales.double(), matrix.column_scales.double())
    rows = refit_row_scales(weight, sums, given[1], moment)
    torch.testing.assert_close(rows, row_scales_by_regression(weight, sums, given[1], inputs))
    columns = refit_column_scales(weight, sums, given[0], moment)
    expected = column_scales_by_regression(weight, sums, given[0], inputs)
    torch.testing.assert_close(columns, expected, rtol=1e-6, atol=1e-6)


def test_scales_that_reach_nothing_are_zero():
    weight, matrix, _, moment = scale_problem()
    nothing = torch.zeros(6, 9, dtype=torch.float64)
    assert (refit_row_scales(weight, nothing, matrix.column_scales.double(), moment) == 0).all()
    assert (refit_column_scales(weight, nothing, matrix.row_scales.double(), moment) == 0).all()
