import pytest
import torch

from oracles import sweep_by_columns, sweep_by_reinversion
from pbsp.solver.compensation import compensated_sweep
from pbsp.solver.hessian import damped, inverse_factor, output_error


def rounded(target: torch.Tensor, columns: slice, metric: torch.Tensor) -> torch.Tensor:
    return target.round()


@pytest.mark.parametrize(("columns", "block", "panel"), [(8, 1, 128), (12, 4, 4), (13, 4, 8), (20, 8, 128)])
def test_sweep_equals_reinversion_block_by_block(columns, block, panel):
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(60, columns, dtype=torch.float64, generator=generator)
    weight = 3 * torch.randn(7, columns, dtype=torch.float64, generator=generator)
    hessian = damped(inputs.T @ inputs / 60, 0.01)
    swept = compensated_sweep(weight, inverse_factor(hessian), rounded, block=block, panel=panel)
    torch.testing.assert_close(swept, sweep_by_reinversion(weight, hessian, block))


def test_metric_is_the_cost_left_after_the_best_correction():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 12, dtype=torch.float64, generator=generator)
    hessian = damped(inputs.T @ inputs / 60, 0.01)
    seen = {}

    def approximate(target, columns, metric):
        seen[columns.start] = metric
        return target

    compensated_sweep(torch.zeros(1, 12, dtype=torch.float64), inverse_factor(hessian), approximate, block=4)
    rest = hessian[4:, 4:]
    schur = rest[:4, :4] - rest[:4, 4:] @ torch.linalg.inv(rest[4:, 4:]) @ rest[4:, :4]
    torch.testing.assert_close(seen[4], schur)


def test_sweep_leaves_its_input_alone():
    weight = torch.randn(3, 8)
    before = weight.clone()
    compensated_sweep(weight, torch.eye(8), rounded, block=4)
    assert torch.equal(weight, before)


def problem(columns, rows=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(80, columns, dtype=torch.float64, generator=generator) @ mix
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator), inputs.T @ inputs / 80


@pytest.mark.parametrize(("columns", "block", "panel"), [(8, 1, 128), (12, 4, 4), (13, 4, 8), (20, 8, 128)])
@pytest.mark.parametrize("mode", ["diagonal", "none"])
def test_other_modes_equal_a_loop_over_columns(columns, block, panel, mode):
    weight, moment = problem(columns)
    factor = inverse_factor(damped(moment, 0.01))
    swept = compensated_sweep(3 * weight, factor, rounded, block=block, panel=panel, mode=mode)
    torch.testing.assert_close(swept, sweep_by_columns(3 * weight, factor, block, mode=mode))


def test_without_compensation_later_columns_are_left_alone():
    weight, moment = problem(12)
    factor, seen = inverse_factor(damped(moment, 0.01)), []

    def approximate(target, columns, metric):
        seen.append(target.clone())
        return torch.zeros_like(target)

    compensated_sweep(weight, factor, approximate, block=5, mode="none")
    assert torch.equal(torch.cat(seen, 1), weight)


def test_for_single_columns_exact_and_diagonal_are_one():
    weight, moment = problem(12)
    factor = inverse_factor(damped(moment, 0.01))
    exact, diagonal = (
        compensated_sweep(weight, factor, rounded, block=1, mode=mode) for mode in ("exact", "diagonal")
    )
    torch.testing.assert_close(exact, diagonal)


def test_exact_errors_are_below_diagonal_ones_and_those_below_none_on_average():
    errors = {"exact": 0.0, "diagonal": 0.0, "none": 0.0}
    for seed in range(20):
        weight, moment = problem(32, rows=16, seed=seed)
        factor = inverse_factor(damped(moment, 0.01))
        for mode in errors:
            swept = compensated_sweep(weight, factor, rounded, block=8, mode=mode)
            errors[mode] += output_error(weight, swept, moment)
    assert errors["exact"] < 0.9 * errors["diagonal"]
    assert errors["diagonal"] < errors["none"]
