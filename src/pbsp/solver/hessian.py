"""The layer's quadratic: damping, and the triangular factor of its inverse that every sweep uses."""

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.errors import CalibrationError


def damped(moment: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """moment + damping · mean(diag) · I, in float64.

    A moment that is all zero (an input that is never active) becomes the identity: with no
    evidence, every weight counts the same.

    Raises:
        CalibrationError: the moment holds NaN or infinite values.
    """
    hessian = moment.double().clone()
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

    Source: GPTQ (arXiv 2210.17323), "Cholesky reformulation".
    """
    factor = hessian.to(torch.float64, copy=True)
    failed_at = torch.empty((), dtype=torch.int32, device=factor.device)
    # In place: at 11,008 features each copy takes 0.97 GB, and three were made.
    torch.linalg.cholesky_ex(factor, out=(factor, failed_at))
    if int(failed_at):
        diagonal = hessian.diagonal()
        raise CalibrationError(
            f"the damped moment of its inputs is not positive definite (column {int(failed_at)} of "
            f"{len(hessian)}, diagonal from {float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}); "
            "raise the damping or calibrate on more tokens"
        )
    torch.cholesky_inverse(factor, out=factor)
    return torch.linalg.cholesky(factor, upper=True, out=factor)


def output_error(
    weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
) -> float:
    """Relative output error tr(R S Rᵀ) / tr(W S Wᵀ), R = W − Q, on the undamped moment S; 0 if W S is 0."""
    moment = moment.double()
    residual = (weight - approximation).double()
    weight = weight.double()
    signal = float(((weight @ moment) * weight).sum())
    return float(((residual @ moment) * residual).sum()) / signal if signal > 0 else 0.0
