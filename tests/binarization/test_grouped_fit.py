from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from oracles import binarized_by_level, coefficients_by_least_squares
from pbsp.binarization.grouped import Scheme
from pbsp.binarization.grouped_fit import BlockFit, nearest_of_four
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


SCHEMES = [
    Scheme(groups, salient_groups, means)
    for groups in (1, 2, 3)
    for salient_groups in (0, 1, 2)
    for means in (True, False)
]


def scheme_problem(scheme, rows=5, columns=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, columns, generator=generator) < 0.8
    salient = torch.rand(columns, generator=generator) < (0.3 if scheme.salient_groups else 0)
    outside = magnitude_groups(weight, keep & ~salient, groups=scheme.groups)
    inside = magnitude_groups(weight, keep & salient, groups=max(scheme.salient_groups, 1))
    fit = BlockFit.start(weight, keep, salient, torch.where(salient, inside, outside), scheme)
    return inputs.T @ inputs / 200, weight, fit


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_start_is_the_base_binarizer_of_every_level(scheme):
    _, weight, fit = scheme_problem(scheme)
    expected = binarized_by_level(weight, fit.keep, fit.salient, fit.groups, means=scheme.means)
    torch.testing.assert_close(fit.dense(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_levels_divide_the_weights_and_scalars_follow_each_other(scheme):
    _, _, fit = scheme_problem(scheme)
    levels = list(scheme.levels())
    positions = [sorted(level.positions) for level in levels]
    assert [position for level in positions for position in level] == list(range(scheme.scalars))
    assert all(level.mean is None or level.mean == max(level.positions) for level in levels)
    assert (sum(fit.members(level).long() for level in levels) == 1).all()
    assert fit.terms().shape == (5, scheme.scalars, 32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_single_updates_never_raise_the_loss_and_refreshes_never_the_squared_error(scheme):
    metric, weight, fit = scheme_problem(scheme)
    losses = [loss(fit, weight, metric)]
    for rounds in (1, 2, 5, 20):
        losses.append(loss(fit.refit(weight, metric, alternations=rounds, ridge=0.0), weight, metric))
    joint = loss(fit.refit(weight, metric), weight, metric)
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))
    assert losses[-1] >= joint * (1 - 1e-5)  # the ridge of the joint solve
    identity = torch.eye(32).double()
    assert loss(fit.refresh(weight), weight, identity) <= loss(fit, weight, identity) + 1e-12
    assert (fit.refit(weight, metric).dense()[~fit.keep] == 0).all()


def test_one_update_is_the_papers_formula():
    """μ ← gᵀS(w − αb) / gᵀSg, then α ← bᵀS(w − μg) / bᵀSb."""
    metric, weight, fit = scheme_problem(Scheme(1, 0))
    once = fit.refit(weight, metric, alternations=1, ridge=0.0)
    for row in range(len(weight)):
        g = fit.keep[row].double()
        b = fit.signs[row] * g
        mean = g @ metric @ (weight[row] - fit.coefficients[row, 0] * b) / (g @ metric @ g)
        alpha = b @ metric @ (weight[row] - mean * g) / (b @ metric @ b)
        assert once.coefficients[row].tolist() == pytest.approx([float(alpha), float(mean)])


def test_column_scales_multiply_the_terms():
    _, _, fit = scheme_problem(Scheme(2, 1, means=False))
    factors = torch.rand(fit.scheme.scalars, 32, dtype=torch.float64)
    scaled = replace(fit, column_scales=factors)
    expected = sum(
        fit.coefficients[:, n, None] * fit.terms()[:, n] * factors[n] for n in range(fit.scheme.scalars)
    )
    torch.testing.assert_close(scaled.dense(), expected)


def test_groups_beyond_those_of_salient_columns_are_clamped():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    salient = torch.arange(8) < 3
    fit = BlockFit.start(weight, torch.ones(3, 8).bool(), salient, torch.full((3, 8), 2, dtype=torch.uint8))
    assert (fit.groups[:, :3] == 0).all()
    assert (fit.groups[:, 3:] == 2).all()


@pytest.mark.parametrize(("first", "second"), [(2.0, 1.0), (1.0, 2.0), (-1.5, 0.5), (1.0, 1.0), (0.0, 0.7)])
def test_of_four_values_the_nearest_is_taken(first, second):
    values = torch.linspace(-4, 4, 81)[None]
    signs, others = nearest_of_four(values, torch.tensor([[first]]), torch.tensor([[second]]))
    distance = (values - signs * first - others * second).abs()
    choices = [(values - s * first - t * second).abs() for s in (1, -1) for t in (1, -1)]
    torch.testing.assert_close(distance, torch.stack(choices).amin(0))
