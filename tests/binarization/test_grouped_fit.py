import pytest
import torch

from oracles import coefficients_by_least_squares
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.binarization.partition import magnitude_groups, salient_columns


def problem(rows=6, columns=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, columns, generator=generator) < 0.8
    salient = salient_columns(weight, keep, weight.square())
    return (
        inputs,
        weight,
        BlockFit.start(weight, keep, salient, magnitude_groups(weight, keep & ~salient, groups=3)),
    )


def loss(fit, weight, metric):
    residual = weight - fit.dense()
    return float(((residual @ metric) * residual).sum())


def test_joint_refit_equals_least_squares_on_the_tokens():
    inputs, weight, fit = problem()
    fitted = fit.refit(weight, inputs.T @ inputs)
    expected = coefficients_by_least_squares(weight, fit.terms(), inputs)
    torch.testing.assert_close(fitted.dense() @ inputs.T, expected, rtol=0, atol=1e-2)  # the ridge is 1e-4


def test_single_updates_converge_to_the_joint_solution():
    inputs, weight, fit = problem()
    metric = inputs.T @ inputs
    joint = fit.refit(weight, metric)
    losses = [loss(fit.refit(weight, metric, alternations=n), weight, metric) for n in (1, 5, 2000)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[-1] == pytest.approx(loss(joint, weight, metric), rel=1e-6)


def test_refresh_takes_the_nearest_level_for_every_weight():
    inputs, weight, fit = problem()
    fit = fit.refit(weight, inputs.T @ inputs).refresh(weight)
    values = fit.coefficients
    dense = fit.dense()
    for row in range(len(weight)):
        for column in fit.keep[row].nonzero()[:, 0].tolist():
            if fit.salient[column]:
                levels = [
                    a * values[row, 6] + b * values[row, 7] + values[row, 8] for a in (1, -1) for b in (1, -1)
                ]
            else:
                alpha, mean = values[row, 2 * int(fit.groups[row, column]) :][:2]
                levels = [mean + alpha, mean - alpha]
            best = min(abs(float(weight[row, column] - level)) for level in levels)
            assert abs(float(weight[row, column] - dense[row, column])) == pytest.approx(best, abs=1e-9)


def test_pruned_weights_are_exactly_zero():
    inputs, weight, fit = problem()
    fitted = fit.refit(weight, inputs.T @ inputs).refresh(weight)
    assert (fitted.dense()[~fit.keep] == 0).all()


def test_empty_groups_have_finite_coefficients():
    _, weight, fit = problem(rows=2, columns=8)
    fitted = BlockFit.start(weight, torch.zeros_like(fit.keep), fit.salient, fit.groups).refit(
        weight, torch.eye(8).double()
    )
    assert torch.isfinite(fitted.coefficients).all()
    assert (fitted.dense() == 0).all()
