"""Method `prune-then-binarize`: an N:M pruner, then the base binarizer: the naive combination."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.methods.blockwise import BlockProblem, fit_blocks
from pbsp.methods.checks import check_blocks, check_choices
from pbsp.methods.rtn import plain_fit
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern
from pbsp.pruning.scores import SCORES, ScoreInputs, hessian
from pbsp.solver.compensation import MODES, compensated_sweep
from pbsp.solver.hessian import damped, inverse_factor

SPARSEGPT = "sparsegpt"


@dataclass(frozen=True)
class PruneThenBinarize:
    """Prune the whole matrix, then binarize what is left as if it were any matrix.

    Attributes:
        pattern: N of every M weights are kept.
        pruner: "sparsegpt" moves later weights to make up for pruned ones; any of `pruning.scores`, such as
            "wanda" and "magnitude", only chooses.
        block: columns that share α and μ.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        compensation: how later blocks absorb the error of binarizing a block; "none" is plain binarization.

    Source: SparseGPT (arXiv 2301.00774), Wanda (arXiv 2306.11695); the combination that arXiv 2502.01705
    argues against.
    """

    rows_interact: ClassVar[bool] = True
    """By the score "si" alone, which compares a weight with the others of its column."""
    pattern: Pattern = Pattern(4, 8)
    pruner: str = SPARSEGPT
    block: int = 128
    damping: float = 0.01
    compensation: str = "none"

    def __post_init__(self) -> None:
        check_choices(self, {"pruner": (SPARSEGPT, *SCORES), "compensation": MODES})
        check_blocks(self.block, self.damping, self.pattern)

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> GroupedBinarization:
        """The binarized weight; raises as `fit_blocks`."""
        self.pattern.check(weight.shape[1])
        factor = inverse_factor(damped(moment, self.damping)).to(weight.dtype)
        if self.pruner == SPARSEGPT:
            pruned, keep = sparsegpt(weight, factor, self.pattern)
        else:
            inputs = ScoreInputs(weight, moment.diagonal().to(weight.dtype), factor.diagonal())
            keep = keep_largest(SCORES[self.pruner](inputs), self.pattern.kept, self.pattern.group)
            pruned = weight * keep
        return fit_blocks(
            pruned,
            moment,
            lambda problem: self._fit_block(problem, keep),
            pattern=self.pattern,
            block=self.block,
            damping=self.damping,
            compensation=self.compensation,
        )

    @staticmethod
    def _fit_block(problem: BlockProblem, keep: Tensor) -> BlockFit:
        return plain_fit(problem.inputs.weight, keep[:, problem.columns])


def sparsegpt(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """The pruned matrix, its kept weights moved, and the mask.

    The mask of an M-group is chosen when the sweep reaches it, by w²/U_jj²; each pruned weight then moves
    all later ones, those of its own group too.

    Args:
        factor: upper U with Uᵀ U = H⁻¹.
    """
    keep = torch.ones_like(weight, dtype=torch.bool)

    def prune(target: Tensor, columns: slice, _: Tensor) -> Tensor:
        triangle = factor[columns, columns]
        scores = hessian(ScoreInputs(target, target[0], triangle.diagonal()))
        keep[:, columns] = keep_largest(scores, pattern.kept, pattern.group)
        moved = target.clone()
        for column in range(pattern.group):
            error = moved[:, column] * ~keep[:, columns.start + column] / triangle[column, column]
            moved[:, column:] -= torch.outer(error, triangle[column, column:])
        return moved * keep[:, columns]

    pruned = compensated_sweep(weight, factor, prune, block=pattern.group)
    return pruned, keep
