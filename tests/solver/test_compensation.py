import pytest
import torch

from oracles import sweep_by_reinversion
from pbsp.solver.compensation import compensated_sweep
from pbsp.solver.hessian import damped, inverse_factor


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
