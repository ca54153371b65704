"""Fitting two sign factors to a matrix: alternating directions for the signs, least squares for scales.

Source: NanoQuant (arXiv 2602.06694), equations numbered as in public replications that quote them, and the
settings of its released code (github.com/SamsungLabs/NanoQuant).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from pbsp.binarization.planes import signs_of
from pbsp.errors import CalibrationError

_POWER_STEPS = 5
_RIDGE = 1e-8


class Side(NamedTuple):
    """One factor while it is fitted, of the rows or of the columns: signs times magnitudes of rank one.

    Attributes:
        consensus: what the other side is fitted against, in the set of allowed matrices.
        dual: the running sum of what latents had left over the consensus, in units of the latents.
    """

    consensus: Float[Tensor, "side rank"]
    dual: Float[Tensor, "side rank"]

    @staticmethod
    def start(latent: Float[Tensor, "side rank"]) -> "Side":
        """The side whose first latent is that."""
        consensus = project(latent)
        return Side(consensus, latent - consensus)

    def step(
        self, other: "Side", target: Float[Tensor, "side other"], *, penalty: float, ridge: float
    ) -> "Side":
        """One round: latent by least squares, its projection, the dual (eqs. 5, 6 and 24)."""
        # With columns of unit length a ridge weighs the same at any scale of the target.
        regressors = normalize(other.consensus, dim=0)
        latent = latent_update(target, regressors, self.consensus - self.dual, penalty=penalty, ridge=ridge)
        consensus = project(latent + self.dual)
        return Side(consensus, self.dual + latent - consensus)


def latent_update(
    target: Float[Tensor, "side other"],
    regressors: Float[Tensor, "other rank"],
    anchor: Float[Tensor, "side rank"],
    *,
    penalty: float,
    ridge: float,
) -> Float[Tensor, "side rank"]:
    """The L with the least |target − L regressorsᵀ|² + penalty · |L − anchor|² + ridge · |L|².

    Raises:
        CalibrationError: the system is not positive definite in the target's precision.
    """
    system = regressors.T @ regressors
    system.diagonal().add_(penalty + ridge)
    factor, failed_at = torch.linalg.cholesky_ex(system)
    if int(failed_at):
        raise CalibrationError(
            f"the least-squares step of its factorization is singular at ridge {ridge}; raise the ridge"
        )
    right = torch.addmm(anchor, target, regressors, beta=penalty)
    # Triangular solves of so many right sides take nearly twice as long as the inverse and a product, and are
    # hardly more exact: regressors of unit length keep the condition below rank / ridge.
    return right @ torch.cholesky_inverse(factor)


def project(matrix: Float[Tensor, "side rank"]) -> Float[Tensor, "side rank"]:
    """The signs of `matrix` times the best magnitudes of rank one, by a few power steps; 0 is positive.

    Source: the sign-value decomposition of OneBit (arXiv 2402.11295), with the code's number of steps.
    """
    magnitudes = matrix.abs()
    # The leading vectors of a matrix without negative entries have none, so ones cannot miss them.
    right = torch.ones_like(magnitudes[0])
    for _ in range(_POWER_STEPS):
        left = normalize(magnitudes @ right, dim=0)
        right = normalize(magnitudes.T @ left, dim=0)
    return signs_of(matrix) * torch.outer(magnitudes @ right, right)


def fit_sides(
    target: Float[Tensor, "out in"], sides: tuple[Side, Side], *, iterations: int, ridge: float
) -> tuple[Side, Side]:
    """Both sides after so many rounds; the penalty rises linearly from 0 towards 1.

    Columns are fitted to the rows of the same round. The released code takes those of the round before;
    a component whose two vectors disagree in sign then turns both in every round. Of 20 planted products of
    rank 1 to 8 it missed 15, this order none; errors of real layers were 1 to 2 % higher.
    """
    rows, columns = sides
    for iteration in range(iterations):
        penalty = iteration / iterations
        rows = rows.step(columns, target, penalty=penalty, ridge=ridge)
        columns = columns.step(rows, target.T, penalty=penalty, ridge=ridge)
    return rows, columns


def mean_scales(
    rows: Float[Tensor, "out rank"], columns: Float[Tensor, "in rank"]
) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]]:
    """Mean magnitudes over the rank (eq. 8).

    Each side alone was fitted to bear the product's size, against columns of unit length, so the rows give
    it up. In the released code the longer side does; the error is the same to four digits.
    """
    return normalize(rows, dim=0).abs().mean(1), columns.abs().mean(1)


def refit_row_scales(
    weight: Float[Tensor, "out in"],
    sums: Float[Tensor, "out in"],
    column_scales: Float[Tensor, "in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out"]:
    """The s₁ with the least tr(R H Rᵀ), R = W − diag(s₁) U Vᵀ diag(s₂); 0 for a row that nothing reaches."""
    approximation = sums * column_scales
    seen = approximation @ hessian
    size = (seen * approximation).sum(1)
    return torch.where(size > 0, (seen * weight).sum(1) / size.clamp(min=1e-300), 0.0)


def refit_column_scales(
    weight: Float[Tensor, "out in"],
    sums: Float[Tensor, "out in"],
    row_scales: Float[Tensor, "out"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "in"]:
    """The s₂ with the least tr(R H Rᵀ): (BᵀB ∘ H) s₂ = diag(Bᵀ W H), B = diag(s₁) U Vᵀ."""
    approximation = row_scales[:, None] * sums
    system = (approximation.T @ approximation) * hessian
    system.diagonal().add_(_RIDGE * system.diagonal().mean() + 1e-300)
    right = (approximation * (weight @ hessian)).sum(0)
    return torch.linalg.solve(system, right)
