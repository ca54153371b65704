"""Method `pbsp`: the paper's own, CFS masks and SPBO over salient and magnitude groups."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import PAPER, GroupedBinarization
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.errors import ConfigError
from pbsp.methods.blockwise import BlockProblem, fit_blocks, partitioned_fit
from pbsp.methods.checks import check_blocks, check_choices
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern
from pbsp.pruning.scores import SCORES, hessian, removal_cost
from pbsp.solver.compensation import MODES

RESIDUAL = "residual"
N_OF_M = "n:m"
CHOICES = {
    "pruning": (N_OF_M, "unstructured", "columns"),
    "score": (*SCORES, RESIDUAL),
    "steps": ("stepwise", "one-shot"),
    "target": ("full", "masked"),
    "update": ("joint", "alternating"),
    "metric": ("moment", "compensated"),
    "compensation": MODES,
}


@dataclass(frozen=True)
class Pbsp:
    """N:M binarization as in "Progressive Binarization with Semi-Structured Pruning for LLMs".

    Attributes:
        pattern: N of every M weights are kept.
        block: columns that are fitted together and share their coefficients.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        pruning: what the pattern's N/M is of: of every M weights, of a row's weights in a block
            ("unstructured"), or of a block's columns. Only n:m can be packed.
        score: what is kept, see `pruning.scores`; "residual" starts from "hessian" and scores again at
            every step by the exact cost of a removal.
        steps: "stepwise" prunes one weight of every group at a time and refits in between (SPBO);
            "one-shot" prunes all at once and then does the same updates.
        updates: τ, rounds of sign refresh and coefficient update after each step.
        update: all coefficients at once, or τ rounds of the paper's single updates.
        refresh: recompute B = sign(w − μ) in every round. Without it the step path leaves no trace.
        target: what a step is fitted to: the full block (eq. 2), or its kept weights alone (eq. 3).
        metric: "moment" is the block's part of H, as in the paper; "compensated" is what an error in the
            block costs after later columns have absorbed what they can.
        compensation: how later blocks absorb a block's error, see `solver.compensation`.
        seed: of the random score.

    Source: arXiv 2502.01705, Alg. 1 and eqs. 2-8; groups from STBLLM (arXiv 2408.01803) and BiLLM
    (arXiv 2402.04291). Where the paper is silent the defaults are this project's, see docs/method.md.
    """

    rows_interact: ClassVar[bool] = True
    """Salient columns and split points are chosen over all rows: linears must not be joined."""
    pattern: Pattern = Pattern(4, 8)
    block: int = 128
    damping: float = 0.01
    pruning: str = N_OF_M
    score: str = RESIDUAL
    steps: str = "stepwise"
    updates: int = 2
    update: str = "joint"
    refresh: bool = True
    target: str = "full"
    metric: str = "moment"
    compensation: str = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        check_blocks(self.block, self.damping, self.pattern)
        if self.updates < 1:
            raise ConfigError(f"updates is {self.updates}; at least 1 is needed")

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> GroupedBinarization:
        """The paper's representation of `weight`, fitted block by block with compensation in between.

        Raises:
            PatternError: the pattern does not tile a row.
            CalibrationError: the moment is not finite or, damped, not positive definite.
        """
        return fit_blocks(
            weight,
            moment,
            self._fit_block,
            pattern=self.pattern if self.pruning == N_OF_M else None,
            block=self.block,
            damping=self.damping,
            compensation=self.compensation,
            seed=self.seed,
        )

    def _fit_block(self, problem: BlockProblem) -> BlockFit:
        """SPBO on one block: a partition from the weights that will stay, then prune and refit in steps."""
        inputs, target = problem.inputs, problem.inputs.weight
        metric = problem.metric if self.metric == "moment" else problem.compensated
        scores = hessian(inputs) if self.score == RESIDUAL else SCORES[self.score](inputs)
        final = self._keep(scores, self.pattern.kept)
        fit = partitioned_fit(problem, final, PAPER)
        if self.steps == "one-shot":
            return self._update(fit.refit(target, metric), target, metric)
        fit = replace(fit, keep=torch.ones_like(final))
        fit = self._update(fit.refit(target, metric), target, metric)
        for count in range(self.pattern.group - 1, self.pattern.kept - 1, -1):
            if self.score == RESIDUAL:
                scores = removal_cost(target, fit.dense(), metric)
            keep = self._keep(scores, count, among=fit.keep)
            fit = self._update(replace(fit, keep=keep), target, metric)
        return fit

    def _keep(self, scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """The mask with `count` of every M weights left, or that share of what `pruning` says."""
        if self.pruning == N_OF_M:
            return keep_largest(scores, count, self.pattern.group, among=among)
        if self.pruning == "columns":
            scores = scores.sum(0, keepdim=True).expand_as(scores)
        width = scores.shape[1]
        return keep_largest(scores, width * count // self.pattern.group, width, among=among)

    def _update(self, fit: BlockFit, target: Tensor, metric: Tensor) -> BlockFit:
        """τ rounds of sign refresh and coefficient update."""
        for _ in range(self.updates):
            if self.refresh:
                fit = fit.refresh(target)
            wanted = target * fit.keep if self.target == "masked" else target
            fit = fit.refit(wanted, metric, alternations=0 if self.update == "joint" else 1)
        return fit
