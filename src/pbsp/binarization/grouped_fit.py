"""Fitting one block of a grouped binarization: coefficients under the metric, signs given the coefficients.

The block is a linear model in a few coefficients per row (`grouped.Scheme`; the paper has nine): each
stands before a *term*, a sign pattern or an indicator on one level's kept weights. SPBO's updates of α
and μ (arXiv 2502.01705, eqs. 3-4) are then the normal equations of these terms, and ARB's are the same
with the identity for a metric.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from pbsp.binarization.grouped import PAPER, Level, Scheme
from pbsp.binarization.planes import signs_of

_RIDGE = 1e-4  # of the mean diagonal: groups of one weight cannot tell α from μ


@dataclass(frozen=True)
class BlockFit:
    """One block of columns: a mask, its partition, signs and coefficients.

    Attributes:
        keep: the kept weights.
        salient: columns with two terms.
        groups: magnitude group of every weight, among those of its kind of column.
        signs: B; residual_signs: B₂, read in salient columns alone.
        coefficients: in the order of `scheme.levels()`.
        scheme: which levels there are.
        column_scales: factors of each coefficient's term in each column; None where all are 1.
    """

    keep: Bool[Tensor, "out in"]
    salient: Bool[Tensor, "in"]
    groups: UInt8[Tensor, "out in"]
    signs: Float[Tensor, "out in"]
    residual_signs: Float[Tensor, "out in"]
    coefficients: Float[Tensor, "out scalars"]
    scheme: Scheme = PAPER
    column_scales: Float[Tensor, "scalars in"] | None = None

    @staticmethod
    def start(
        weight: Float[Tensor, "out in"],
        keep: Bool[Tensor, "out in"],
        salient: Bool[Tensor, "in"],
        groups: UInt8[Tensor, "out in"],
        scheme: Scheme = PAPER,
    ) -> "BlockFit":
        """The base binarizer: in each level μ = mean w, B = sign(w − μ), α = mean |w − μ|.

        In salient columns the residual is binarized once more, by its own mean and mean magnitude;
        the two means are one number. Source: arXiv 2502.01705, eq. 1 and section 3.
        """
        coefficients = weight.new_zeros(len(weight), scheme.scalars)
        groups = torch.where(salient, groups.clamp_max(max(scheme.salient_groups - 1, 0)), groups)
        fit = BlockFit(keep, salient, groups, signs_of(weight), signs_of(weight), coefficients, scheme)
        signs, residual_signs = fit.signs, fit.residual_signs
        for level in scheme.levels():
            member = keep & fit.members(level)
            mean, centred = _centred(weight, member, means=scheme.means)
            signs = torch.where(fit.members(level), signs_of(centred), signs)
            alpha = _member_mean(centred.abs(), member)
            coefficients[:, level.alpha] = alpha[:, 0]
            if level.second is not None:
                shift, rest = _centred(centred - alpha * signs, member, means=scheme.means)
                mean = mean + shift
                residual_signs = torch.where(fit.members(level), signs_of(rest), residual_signs)
                coefficients[:, level.second] = _member_mean(rest.abs(), member)[:, 0]
            if level.mean is not None:
                coefficients[:, level.mean] = mean[:, 0]
        return replace(fit, signs=signs, residual_signs=residual_signs)

    def members(self, level: Level) -> Bool[Tensor, "out in"]:
        """The level's weights, kept or not."""
        return (self.salient == level.salient) & (self.groups == level.group)

    def terms(self) -> Float[Tensor, "out scalars in"]:
        """What each coefficient multiplies."""
        parts: list[Tensor] = []
        for level in self.scheme.levels():
            member = (self.keep & self.members(level)).to(self.signs.dtype)
            parts.append(self.signs * member)
            if level.second is not None:
                parts.append(self.residual_signs * member)
            if level.mean is not None:
                parts.append(member)
        terms = torch.stack(parts, 1)
        return terms if self.column_scales is None else terms * self.column_scales

    def dense(self) -> Float[Tensor, "out in"]:
        """The block's approximation; exactly 0 where a weight is pruned."""
        return torch.bmm(self.coefficients[:, None], self.terms())[:, 0]

    def refit(
        self,
        weight: Float[Tensor, "out in"],
        metric: Float[Tensor, "in in"],
        *,
        alternations: int = 0,
        ridge: float = _RIDGE,
    ) -> "BlockFit":
        """New coefficients for the same mask and signs.

        Args:
            weight: the target.
            metric: G of the loss (w − q) G (w − q)ᵀ.
            alternations: 0 solves for all coefficients at once. Otherwise so many rounds of single
                updates, each coefficient against the target less all other terms (Gauss-Seidel);
                they converge to the joint solution.
            ridge: as a fraction of the normal equations' mean diagonal; single updates also work with 0.
        """
        terms = self.terms()
        seen = (terms.reshape(-1, terms.shape[2]) @ metric).view_as(terms)
        system = torch.bmm(seen, terms.transpose(1, 2))
        right = torch.bmm(seen, weight[:, :, None])[:, :, 0]
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal.add_(ridge * diagonal.mean(1, keepdim=True) + 1e-20)
        if not alternations:
            return replace(self, coefficients=torch.linalg.solve(system, right))
        solution = self.coefficients.clone()
        order = [position for level in self.scheme.levels() for position in level.positions]
        for _ in range(alternations):
            for index in order:
                others = (system[:, index] * solution).sum(1) - diagonal[:, index] * solution[:, index]
                solution[:, index] = (right[:, index] - others) / diagonal[:, index]
        return replace(self, coefficients=solution)

    def refresh(self, weight: Float[Tensor, "out in"]) -> "BlockFit":
        """The nearest value for every weight, coefficients fixed: B = sign(w − μ), two signs if salient."""
        signs, residual_signs = self.signs, self.residual_signs
        for level in self.scheme.levels():
            member = self.members(level)
            centred = weight if level.mean is None else weight - self.coefficients[:, level.mean, None]
            alpha = self.coefficients[:, level.alpha, None]
            if level.second is None:
                nearest = signs_of(centred) * signs_of(alpha)
            else:
                second = self.coefficients[:, level.second, None]
                nearest, nearest_residual = nearest_of_four(centred, alpha, second)
                residual_signs = torch.where(member, nearest_residual, residual_signs)
            signs = torch.where(member, nearest, signs)
        return replace(self, signs=signs, residual_signs=residual_signs)


def _member_mean(values: Tensor, member: Tensor) -> Tensor:
    """Mean over each row's members, 0 where there is none."""
    return (values * member).sum(1, keepdim=True) / member.sum(1, keepdim=True).clamp_min(1)


def _centred(values: Tensor, member: Tensor, *, means: bool) -> tuple[Tensor, Tensor]:
    """The members' mean, or 0, and what is left of the values."""
    mean = _member_mean(values, member) if means else values.new_zeros(len(values), 1)
    return mean, values - mean


def nearest_of_four(centred: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The signs (s, t) for which s·first + t·second is nearest to each value."""
    # The four levels are symmetric: settle the sign of the larger step, then of the smaller one.
    outer_is_first = first.abs() >= second.abs()
    outer = torch.where(outer_is_first, first, second)
    inner = torch.where(outer_is_first, second, first)
    outer_sign = signs_of(centred) * signs_of(outer)
    inner_sign = signs_of(centred - outer_sign * outer) * signs_of(inner)
    return (
        torch.where(outer_is_first, outer_sign, inner_sign),
        torch.where(outer_is_first, inner_sign, outer_sign),
    )
