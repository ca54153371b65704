"""Fitting one block of a grouped binarization: coefficients under the metric, signs given the coefficients.

The block is a linear model in nine coefficients per row (`grouped.SCALARS`): each stands before a
*term*, a sign pattern or an indicator on one group's kept weights. SPBO's updates of α and μ
(arXiv 2502.01705, eqs. 3-4) are then the normal equations of these terms.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from pbsp.binarization.grouped import GROUPS, SCALARS
from pbsp.binarization.planes import signs_of

_RIDGE = 1e-4  # of the mean diagonal: groups of one weight cannot tell α from μ


@dataclass(frozen=True)
class BlockFit:
    """One block of columns: a mask, its partition, signs and coefficients.

    Attributes:
        keep: the kept weights.
        salient: columns with two terms.
        groups: magnitude group of every weight outside salient columns.
        signs: B; residual_signs: B₂, read in salient columns alone.
        coefficients: in the order of `grouped.SCALARS`.
    """

    keep: Bool[Tensor, "out in"]
    salient: Bool[Tensor, "in"]
    groups: UInt8[Tensor, "out in"]
    signs: Float[Tensor, "out in"]
    residual_signs: Float[Tensor, "out in"]
    coefficients: Float[Tensor, "out scalars"]

    @staticmethod
    def start(
        weight: Float[Tensor, "out in"],
        keep: Bool[Tensor, "out in"],
        salient: Bool[Tensor, "in"],
        groups: UInt8[Tensor, "out in"],
    ) -> "BlockFit":
        """Signs of the weights, and of what one mean magnitude leaves of them; no coefficients yet."""
        signs = signs_of(weight)
        kept = (keep & salient).to(weight.dtype)
        mean = (weight.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        residual_signs = signs_of(weight - mean * signs)
        return BlockFit(keep, salient, groups, signs, residual_signs, weight.new_zeros(len(weight), SCALARS))

    def terms(self) -> Float[Tensor, "out scalars in"]:
        """What each coefficient multiplies."""
        parts: list[Tensor] = []
        for group in range(GROUPS):
            member = (self.keep & ~self.salient & (self.groups == group)).to(self.signs.dtype)
            parts += [self.signs * member, member]
        member = (self.keep & self.salient).to(self.signs.dtype)
        parts += [self.signs * member, self.residual_signs * member, member]
        return torch.stack(parts, 1)

    def dense(self) -> Float[Tensor, "out in"]:
        """The block's approximation; exactly 0 where a weight is pruned."""
        return torch.bmm(self.coefficients[:, None], self.terms())[:, 0]

    def refit(
        self, weight: Float[Tensor, "out in"], metric: Float[Tensor, "in in"], *, alternations: int = 0
    ) -> "BlockFit":
        """New coefficients for the same mask and signs.

        Args:
            weight: the target.
            metric: G of the loss (w − q) G (w − q)ᵀ.
            alternations: 0 solves for all coefficients at once. Otherwise so many rounds of single
                updates, each coefficient against the target less all other terms (Gauss-Seidel);
                they converge to the joint solution.
        """
        terms = self.terms()
        seen = (terms.reshape(-1, terms.shape[2]) @ metric).view_as(terms)
        system = torch.bmm(seen, terms.transpose(1, 2))
        right = torch.bmm(seen, weight[:, :, None])[:, :, 0]
        ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-20
        system.diagonal(dim1=1, dim2=2).add_(ridge)
        if not alternations:
            return replace(self, coefficients=torch.linalg.solve(system, right))
        solution = self.coefficients.clone()
        for _ in range(alternations):
            for index in _ALTERNATION_ORDER:
                others = (system[:, index] * solution).sum(1) - system[:, index, index] * solution[:, index]
                solution[:, index] = (right[:, index] - others) / system[:, index, index]
        return replace(self, coefficients=solution)

    def refresh(self, weight: Float[Tensor, "out in"]) -> "BlockFit":
        """The nearest level for every weight, coefficients fixed: B = sign(w − μ), two signs if salient."""
        values = self.coefficients
        mean = torch.where(self.salient, values[:, -1:], 0.0)
        slope = torch.ones_like(weight)
        for group in range(GROUPS):
            member = (self.groups == group) & ~self.salient
            mean = torch.where(member, values[:, 2 * group + 1, None], mean)
            slope = torch.where(member, signs_of(values[:, 2 * group, None]), slope)
        centred = weight - mean
        signs, residual_signs = _nearest_of_four(centred, values[:, -3, None], values[:, -2, None])
        signs = torch.where(self.salient, signs, signs_of(centred) * slope)
        return replace(self, signs=signs, residual_signs=residual_signs)


_ALTERNATION_ORDER = (1, 0, 3, 2, 5, 4, 8, 6, 7)  # μ before α, as the paper updates them


def _nearest_of_four(centred: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
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
