import pytest
import torch

from pbsp.packed_linear import PackedLinear
from pbsp.recovery.tuned_low_rank import TunedLowRank, first_latents
from random_low_rank import random_low_rank

FIELDS = ("row_signs", "column_signs", "row_scales", "column_scales")


def problem(rows=6, columns=10, rank=5):
    matrix = random_low_rank(rows, columns, rank)
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return matrix, matrix.dense() + noise


def shaken(tuned, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*tuned.changes(), *tuned.codes()):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    tuned.refresh()
    return tuned


@pytest.mark.parametrize("codes", [False, True])
def test_untuned_it_is_the_matrix(codes):
    matrix, weight = problem()
    bias = torch.arange(6.0)
    tuned = TunedLowRank(matrix, bias, original=weight if codes else None)
    tuned.refresh()
    x = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tuned(x), x @ matrix.dense().T + bias)
    again = tuned.representation()
    assert all(torch.equal(getattr(again, field), getattr(matrix, field)) for field in FIELDS)
    assert len(tuned.codes()) == 2 * codes


@pytest.mark.parametrize("codes", [False, True])
def test_tuned_it_stores_what_it_computed_with(codes):
    matrix, weight = problem()
    tuned = shaken(TunedLowRank(matrix, None, original=weight if codes else None))
    stored = tuned.representation()
    assert torch.equal(stored.row_signs, matrix.row_signs) is not codes
    assert torch.equal(tuned.weight, stored.dense())
    packed = PackedLinear.of(stored)  # asserts that scales have the stored format
    assert torch.equal(packed.dense(), stored.dense())


def test_the_gradient_passes_the_rounding():
    matrix, weight = problem()
    tuned = shaken(TunedLowRank(matrix, None, original=weight))
    x = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    target = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    (tuned(x) - target).square().sum().backward(inputs=[tuned.weight])
    tuned.pull()
    assert tuned.weight.grad is None
    stored = tuned.representation()
    leaves = [getattr(stored, field).float().requires_grad_() for field in FIELDS]
    rows, columns, row_scales, column_scales = leaves
    dense = row_scales[:, None] * (rows @ columns.T) * column_scales
    (x @ dense.T - target).square().sum().backward()
    of_change = [rows.grad, columns.grad]
    for found, expected in zip(tuned.codes(), of_change, strict=True):
        torch.testing.assert_close(found.grad, expected, rtol=1e-4, atol=1e-3)
    first = [matrix.row_scales, matrix.column_scales]
    for found, scales, leaf in zip(tuned.changes(), first, (row_scales, column_scales), strict=True):
        torch.testing.assert_close(found.grad, leaf.grad * scales, rtol=1e-4, atol=1e-3)


def test_first_latents_give_the_signs_and_lean_to_the_original():
    matrix, _ = problem(12, 40, 5)
    weight = matrix.dense() + 4 * torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    for latents, signs in zip(
        first_latents(matrix, weight), (matrix.row_signs, matrix.column_signs), strict=True
    ):
        assert torch.equal(latents.sign(), signs.float())
        assert 0.019 < float(latents.abs().min()) < 0.5 < float(latents.abs().max()) <= 1.5
    exact = first_latents(matrix, matrix.dense())  # nothing leans where nothing is left
    assert all(float((latents.abs() - 1).abs().max()) < 0.05 for latents in exact)
