"""The layer's quadratic: damping, and the triangular factor of its inverse that every sweep uses."""

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.errors import CalibrationError

_INVERTED_ROWS = 256
_MOVED_NUMBERS = 1 << 22


def damped(moment: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """moment + damping · mean(diag) · I, in float64.

    A moment that is all zero (an input that is never active) becomes the identity: with no
    evidence, every weight counts the same.

    Raises:
        CalibrationError: the moment holds NaN or infinite values.
    """
    hessian = moment.to(torch.float64, copy=True)
    if not bool(torch.isfinite(hessian).all()):
        bad = int((~torch.isfinite(hessian)).any(0).sum())
        raise CalibrationError(
            f"the moment of its inputs is NaN or infinite in {bad} of {len(hessian)} columns"
        )
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return hessian


def inverse_factor(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Upper-triangular U with Uᵀ U = hessian⁻¹, in float64.

    Args:
        hessian: a damped moment; symmetric, squared activation units.

    Raises:
        CalibrationError: the hessian is not positive definite.

    Source: the factor of GPTQ (arXiv 2210.17323), "Cholesky reformulation".
    """
    # H = M Mᵀ with M upper is Cholesky's factorisation of the columns in reverse order, and then U = M⁻¹: one
    # factorisation, where inverting H first takes two and twice as long. All in one copy: at 11,008
    # features it takes 0.97 GB.
    factor = hessian.to(torch.float64).flip(0, 1)
    failed_at = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed_at))
    if int(failed_at):
        diagonal = hessian.diagonal()
        raise CalibrationError(
            f"the damped moment of its inputs is not positive definite (column "
            f"{len(hessian) + 1 - int(failed_at)} of {len(hessian)}, diagonal from "
            f"{float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}); raise the damping or calibrate on "
            "more tokens"
        )
    _invert_lower(factor)
    _reverse(factor)
    return factor


def _invert_lower(matrix: Float[Tensor, "in in"]) -> None:
    """Replace a lower-triangular matrix by its inverse, some rows at a time."""
    for start in range(0, len(matrix), _INVERTED_ROWS):
        rows = matrix[start : start + _INVERTED_ROWS]
        corner = rows[:, start : start + len(rows)]
        identity = torch.eye(len(rows), dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        rows[:, :start] = (inverse @ rows[:, :start]) @ matrix[:start, :start]
        rows[:, :start].neg_()
        corner.copy_(inverse)


def _reverse(matrix: Float[Tensor, "in in"]) -> None:
    """Reverse the order of the rows and of the columns, in place."""
    numbers = matrix.view(-1)
    middle = len(numbers) // 2
    for low in range(0, middle, _MOVED_NUMBERS):
        high = min(low + _MOVED_NUMBERS, middle)
        first, last = numbers[low:high], numbers[len(numbers) - high : len(numbers) - low]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def output_error(
    weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
) -> float:
    """Relative output error tr(R S Rᵀ) / tr(W S Wᵀ), R = W − Q, on the undamped moment S; 0 if W S is 0."""
    moment = moment.double()
    residual = (weight - approximation).double()
    weight = weight.double()
    signal = float(((weight @ moment) * weight).sum())
    return float(((residual @ moment) * residual).sum()) / signal if signal > 0 else 0.0
