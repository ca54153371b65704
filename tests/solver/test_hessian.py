import pytest
import torch

from pbsp.errors import CalibrationError
from pbsp.solver.hessian import damped, inverse_factor, output_error


def moment_of(tokens: int, features: int) -> torch.Tensor:
    inputs = torch.randn(tokens, features, generator=torch.Generator().manual_seed(1))
    return inputs.T @ inputs / tokens


def test_inverse_factor_is_upper_and_factors_the_inverse():
    hessian = damped(moment_of(50, 12), 0.01)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))


@pytest.mark.parametrize("features", [1, 2, 255, 256, 257, 600])
def test_the_factor_is_that_of_an_explicit_inverse(features):
    hessian = damped(moment_of(2 * features, features), 0.01)
    before = hessian.clone()
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(
        inverse_factor(hessian), expected, rtol=1e-9, atol=1e-9 * float(expected.max())
    )
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("tokens", [1, 3])
def test_damping_makes_a_rank_deficient_moment_solvable(tokens):
    factor = inverse_factor(damped(moment_of(tokens, 16), 0.01))
    assert torch.isfinite(factor).all()


def test_damping_handles_a_dead_column_and_an_all_zero_moment():
    moment = moment_of(50, 8)
    moment[3] = moment[:, 3] = 0
    assert torch.isfinite(inverse_factor(damped(moment, 0.01))).all()
    torch.testing.assert_close(damped(torch.zeros(4, 4), 0.01), torch.eye(4, dtype=torch.float64))


def test_condition_1e12_is_solved():
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    moment = basis @ torch.diag(torch.logspace(-6, 6, 16, dtype=torch.float64)) @ basis.T
    assert torch.isfinite(inverse_factor(damped(moment, 1e-6))).all()


def test_inverse_factor_names_the_cause_when_the_moment_is_not_positive_definite():
    with pytest.raises(
        CalibrationError, match=r"not positive definite \(column 2 of 3, diagonal from -1 to 1"
    ):
        inverse_factor(torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value):
    moment = moment_of(50, 8)
    moment[2, 5] = value
    with pytest.raises(CalibrationError, match="NaN or infinite in 1 of 8"):
        damped(moment, 0.01)


def test_output_error_equals_the_energy_lost_over_the_tokens():
    generator = torch.Generator().manual_seed(2)
    inputs, weight, other = (torch.randn(*s, generator=generator) for s in [(40, 6), (5, 6), (5, 6)])
    expected = ((inputs @ (weight - other).T) ** 2).sum() / ((inputs @ weight.T) ** 2).sum()
    assert output_error(weight, other, inputs.T @ inputs / 40) == pytest.approx(float(expected), rel=1e-5)
    assert output_error(torch.zeros(5, 6), other, inputs.T @ inputs) == 0.0
