"""Method `stbllm`: STBLLM, N:M by standardized importance, then salient columns and three groups."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import PAPER, GroupedBinarization
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.methods.blockwise import BlockProblem, fit_blocks, partitioned_fit
from pbsp.methods.checks import check_blocks, check_choices
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern
from pbsp.pruning.scores import SCORES
from pbsp.solver.compensation import MODES


@dataclass(frozen=True)
class Stbllm:
    """Mask first, binarize once, no refit.

    Attributes:
        pattern: N of every M weights are kept.
        block: columns that are fitted together and share their scalars.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        score: "si" as published, or another of `pruning.scores`.
        zeros: "kept" leaves pruned weights at exactly 0; "released" binarizes them with the others, as
            the authors' released code does: not N:M any more, and counted as the dense signs it is.
        compensation: how later blocks absorb a block's error; "diagonal" is what the authors' code does.

    Source: STBLLM (arXiv 2408.01803).
    """

    rows_interact: ClassVar[bool] = True
    allocation: ClassVar[str] = "outliers"
    pattern: Pattern = Pattern(4, 8)
    block: int = 128
    damping: float = 0.01
    score: str = "si"
    zeros: str = "kept"
    compensation: str = "diagonal"

    def __post_init__(self) -> None:
        choices = {"score": tuple(SCORES), "zeros": ("kept", "released"), "compensation": MODES}
        check_choices(self, choices)
        check_blocks(self.block, self.damping, self.pattern)

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> GroupedBinarization:
        """The binarized weight; raises as `fit_blocks`."""
        self.pattern.check(weight.shape[1])
        return fit_blocks(
            weight,
            moment,
            self._fit_block,
            pattern=self.pattern if self.zeros == "kept" else None,
            block=self.block,
            damping=self.damping,
            compensation=self.compensation,
        )

    def _fit_block(self, problem: BlockProblem) -> BlockFit:
        target = problem.inputs.weight
        keep = keep_largest(SCORES[self.score](problem.inputs), self.pattern.kept, self.pattern.group)
        if self.zeros == "kept":
            return partitioned_fit(problem, keep, PAPER)
        pruned = replace(problem, inputs=replace(problem.inputs, weight=target * keep))
        return partitioned_fit(pruned, torch.ones_like(keep), PAPER)
