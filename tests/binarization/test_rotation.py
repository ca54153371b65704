import math

import pytest
import torch

from pbsp.binarization.rotation import (
    SIZES,
    check_rotation,
    column_signs,
    hadamard,
    rotate,
    rotate_moment,
    rotation_for,
    unrotate,
)
from pbsp.errors import ConfigError


def sign_by_integers(column):
    """The sign from docs/format.md, in Python's integers."""
    mixed = column
    mixed = ((mixed ^ mixed >> 16) * 0x85EBCA6B) % 2**32
    mixed = ((mixed ^ mixed >> 13) * 0xC2B2AE35) % 2**32
    return -1.0 if (mixed ^ mixed >> 16) & 1 else 1.0


def basis(columns, size):
    """R, entry by entry."""
    matrix = torch.zeros(columns, columns, dtype=torch.float64)
    for run in range(0, columns, size):
        for i in range(size):
            for j in range(size):
                sign = sign_by_integers(run + i) * (-1) ** (i & j).bit_count()
                matrix[run + i, run + j] = sign / math.sqrt(size)
    return matrix


@pytest.mark.parametrize(("columns", "size"), [(4, 4), (48, 16), (128, 64), (64, 1)])
def test_it_is_the_product_with_the_matrix_of_the_format(columns, size):
    x = torch.randn(3, 2, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = basis(columns, size) if size > 1 else torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, size), x @ matrix)
    torch.testing.assert_close(unrotate(x, size), x @ matrix.T)
    torch.testing.assert_close(unrotate(rotate(x, size), size), x)
    moment = x[0].T @ x[0]
    torch.testing.assert_close(rotate_moment(moment.clone(), size), matrix.T @ moment @ matrix)


def test_a_moment_of_more_rows_than_are_turned_at_once(monkeypatch):
    monkeypatch.setattr("pbsp.binarization.rotation._ROWS_AT_ONCE", 10)
    x = torch.randn(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, 16)
    torch.testing.assert_close(rotate_moment(x.T @ x, 16), turned.T @ turned)


def test_signs_are_even_and_their_runs_differ():
    signs = column_signs(4096)
    assert abs(float(signs.mean())) < 0.05
    assert len({tuple(run.tolist()) for run in signs.split(64)}) == 64


@pytest.mark.parametrize("size", SIZES[:5])
def test_hadamard_matrices_are_orthogonal_and_exact(size):
    matrix = hadamard(size)
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.T)


def test_the_size_follows_from_the_columns():
    assert [rotation_for(columns, 64) for columns in (576, 1536, 48, 20, 7)] == [64, 64, 16, 4, 1]
    assert rotation_for(4096, 1) == 1
    with pytest.raises(ConfigError, match="rotation is 32; choose one of 1, 4, 16, 64"):
        check_rotation(32)


def test_gradients_turn_back():
    x = torch.randn(
        2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    weights = torch.randn(2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (rotate(x, 16) * weights).sum().backward()
    torch.testing.assert_close(x.grad, unrotate(weights, 16))
    plain, x.grad = x.grad, None
    (torch.ops.pbsp.rotate(x, 16) * weights).sum().backward()  # as graphs have it
    torch.testing.assert_close(x.grad, plain)


def test_it_works_after_inference_mode():
    with torch.inference_mode():
        rotate(torch.ones(1, 1024), 1024)
    x = torch.ones(1, 1024, requires_grad=True)
    rotate(x, 1024).sum().backward()
    assert x.grad is not None
