"""Method `billm`: BiLLM, salient columns twice and the others in two magnitude groups."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.methods.blockwise import BlockProblem, fit_blocks, partitioned_fit
from pbsp.methods.checks import check_blocks, check_choices
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern
from pbsp.pruning.scores import SCORES
from pbsp.solver.compensation import MODES


@dataclass(frozen=True)
class Billm:
    """Dense signs with structural salience, or the naive N:M of them.

    Attributes:
        pattern: None as published; with N:M, only N of every M weights are kept first.
        block: columns that are fitted together and share their scalars.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        score: what an N:M keeps, see `pruning.scores`.
        compensation: how later blocks absorb a block's error; "diagonal" is what the authors' code does.

    Source: BiLLM (arXiv 2402.04291).
    """

    rows_interact: ClassVar[bool] = True
    pattern: Pattern | None = None
    block: int = 128
    damping: float = 0.01
    score: str = "hessian"
    compensation: str = "diagonal"

    def __post_init__(self) -> None:
        check_choices(self, {"score": tuple(SCORES), "compensation": MODES})
        check_blocks(self.block, self.damping, self.pattern)

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> GroupedBinarization:
        """The binarized weight; raises as `fit_blocks`."""
        return fit_blocks(
            weight,
            moment,
            self._fit_block,
            pattern=self.pattern,
            block=self.block,
            damping=self.damping,
            compensation=self.compensation,
        )

    def _fit_block(self, problem: BlockProblem) -> BlockFit:
        target = problem.inputs.weight
        keep = torch.ones_like(target) > 0
        if self.pattern is not None:
            scores = SCORES[self.score](problem.inputs)
            keep = keep_largest(scores, self.pattern.kept, self.pattern.group)
        return partitioned_fit(problem, keep, Scheme(groups=2))
