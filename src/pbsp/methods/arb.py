"""Method `arb`: ARB-LLM, BiLLM's groups with alternating refined binarization."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.binarization.planes import signs_of
from pbsp.errors import ConfigError
from pbsp.methods.billm import partitioned_fit
from pbsp.methods.blockwise import BlockProblem, fit_blocks
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
            fit = fit.refit(target, identity, alternations=1).refresh(target)
        if self.variant == "x":
            fit = fit.refit(target, problem.metric, alternations=self.rounds)
        return fit


def rank_one_scales(fit: BlockFit, weight: Float[Tensor, "out in"], *, rounds: int) -> BlockFit:
    """In each level α_row·α_column·B by alternating least squares; in salient columns a second such term."""
    coefficients = torch.zeros_like(fit.coefficients)
    factors = weight.new_ones(fit.scheme.scalars, weight.shape[1])
    signs, residual_signs = fit.signs, fit.residual_signs
    for level in fit.scheme.levels():
        member = fit.members(level)
        signs = torch.where(member, signs_of(weight), signs)
        rest = weight - _set_term(level.alpha, weight, member, coefficients, factors, rounds)
        if level.second is not None:
            residual_signs = torch.where(member, signs_of(rest), residual_signs)
            _set_term(level.second, rest, member, coefficients, factors, rounds)
    return replace(
        fit, signs=signs, residual_signs=residual_signs, coefficients=coefficients, column_scales=factors
    )


def _set_term(
    position: int, values: Tensor, member: Tensor, coefficients: Tensor, factors: Tensor, rounds: int
) -> Tensor:
    """Write row and column scales of one term; returns what it stands for at the members."""
    size, one = values.abs() * member, member.to(values.dtype)
    rows, columns = values.new_ones(len(values)), values.new_ones(values.shape[1])
    for _ in range(rounds):
        rows = (size @ columns) / (one @ columns.square()).clamp_min(1e-30)
        columns = (rows @ size) / (rows.square() @ one).clamp_min(1e-30)
    # Column scales are near 1, so that both fit in float16; columns without a member stay at 1.
    used = one.any(0)
    mean = columns[used].mean() if bool(used.any()) else columns.new_ones(())
    mean = mean if mean > 0 else torch.ones_like(mean)
    coefficients[:, position] = rows * mean
    factors[position] = torch.where(used, columns / mean, 1.0)
    return signs_of(values) * torch.outer(coefficients[:, position], factors[position])
