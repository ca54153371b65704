"""Method `arb`: ARB-LLM, BiLLM's groups with alternating refined binarization."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit, nearest_of_four
from pbsp.binarization.planes import signs_of
from pbsp.errors import ConfigError
from pbsp.methods.blockwise import BlockProblem, fit_blocks, partitioned_fit
from pbsp.methods.checks import check_blocks, check_choices
from pbsp.solver.compensation import MODES


@dataclass(frozen=True)
class Arb:
    """Refine μ, α and B in turns.

    Attributes:
        variant: "arb" refines against the weights; "x" then refines μ and α against the outputs; "rc" has
            no μ but a scale for every row and column, also refined in turns.
        bitmap: split salient columns by magnitude, too (the column-group bitmap).
        rounds: of each refinement.
        block: columns that are fitted together and share their scalars.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        compensation: how later blocks absorb a block's error; "diagonal" is what the authors' code does.

    Source: ARB-LLM (arXiv 2410.03129).
    """

    rows_interact: ClassVar[bool] = True
    variant: str = "rc"
    bitmap: bool = True
    rounds: int = 15
    block: int = 128
    damping: float = 0.01
    compensation: str = "diagonal"

    def __post_init__(self) -> None:
        check_choices(self, {"variant": ("arb", "x", "rc"), "compensation": MODES})
        check_blocks(self.block, self.damping)
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}; at least 1 is needed")

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> GroupedBinarization:
        """The binarized weight; raises as `fit_blocks`."""
        return fit_blocks(
            weight,
            moment,
            self._fit_block,
            pattern=None,
            block=self.block,
            damping=self.damping,
            compensation=self.compensation,
        )

    def _fit_block(self, problem: BlockProblem) -> BlockFit:
        target = problem.inputs.weight
        scheme = Scheme(groups=2, salient_groups=1 + self.bitmap, means=self.variant != "rc")
        fit = partitioned_fit(problem, torch.ones_like(target) > 0, scheme)
        if self.variant == "rc":
            return rank_one_scales(fit, target, rounds=self.rounds)
        identity = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
        for _ in range(self.rounds):
            fit = fit.refit(target, identity, alternations=1, ridge=0.0).refresh(target)
        if self.variant == "x":
            fit = fit.refit(target, problem.metric, alternations=self.rounds, ridge=0.0)
        return fit


class _Term(NamedTuple):
    """α_row·α_column·B."""

    signs: Float[Tensor, "out in"]
    rows: Float[Tensor, "out"]
    columns: Float[Tensor, "in"]

    @property
    def scales(self) -> Float[Tensor, "out in"]:
        return torch.outer(self.rows, self.columns)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.scales * self.signs

    def refitted(self, values: Float[Tensor, "out in"], member: Float[Tensor, "out in"]) -> "_Term":
        """The least-squares row scales, then the column scales under them; 0 where there is no member."""
        seen = self.signs * values * member
        rows = (seen @ self.columns) / (member @ self.columns.square()).clamp_min(1e-30)
        columns = (rows @ seen) / (rows.square() @ member).clamp_min(1e-30)
        return _Term(self.signs, rows, columns)


def rank_one_scales(fit: BlockFit, weight: Float[Tensor, "out in"], *, rounds: int) -> BlockFit:
    """In each level α_row·α_column·B by alternating least squares; in salient columns two such terms.

    The two are refitted in turns, each to what the other leaves, and their signs chosen again in every
    round, as the authors' code does.
    """
    coefficients = torch.zeros_like(fit.coefficients)
    factors = weight.new_ones(fit.scheme.scalars, weight.shape[1])
    signs, residual_signs = fit.signs, fit.residual_signs
    for level in fit.scheme.levels():
        member = fit.members(level)
        one = member.to(weight.dtype)
        first = _start(weight, one)
        if level.second is None:
            for _ in range(rounds):
                first = first.refitted(weight, one)
        else:
            second = _start(weight - first.dense(), one)
            for _ in range(rounds):
                first = first.refitted(weight - second.dense(), one)
                second = second.refitted(weight - first.dense(), one)
                nearest = nearest_of_four(weight, first.scales, second.scales)
                first, second = (
                    term._replace(signs=s) for term, s in zip((first, second), nearest, strict=True)
                )
            residual_signs = torch.where(member, second.signs, residual_signs)
            coefficients[:, level.second], factors[level.second] = _split_scales(second, member)
        signs = torch.where(member, first.signs, signs)
        coefficients[:, level.alpha], factors[level.alpha] = _split_scales(first, member)
    return replace(
        fit, signs=signs, residual_signs=residual_signs, coefficients=coefficients, column_scales=factors
    )


def _start(values: Tensor, member: Tensor) -> _Term:
    """The values' signs, and the mean magnitude of each row's members."""
    rows = (values.abs() * member).sum(1) / member.sum(1).clamp_min(1)
    return _Term(signs_of(values), rows, values.new_ones(values.shape[1]))


def _split_scales(term: _Term, member: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column scales, those of columns near 1 so that both fit in float16; 1 without a member."""
    used = member.any(0)
    mean = term.columns[used].abs().mean() if bool(used.any()) else term.columns.new_ones(())
    mean = mean if mean > 0 else torch.ones_like(mean)
    return term.rows * mean, torch.where(used, term.columns / mean, 1.0)
