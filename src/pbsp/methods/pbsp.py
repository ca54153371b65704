"""Method `pbsp`: the paper's own, CFS masks and SPBO over salient and magnitude groups."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.binarization.partition import salient_columns, trisect
from pbsp.errors import ConfigError
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern
from pbsp.pruning.scores import SCORES, ScoreInputs, hessian, removal_cost
from pbsp.solver.compensation import compensated_sweep
from pbsp.solver.hessian import damped, inverse_factor

RESIDUAL = "residual"
CHOICES = {
    "score": (*SCORES, RESIDUAL),
    "steps": ("stepwise", "one-shot"),
    "target": ("full", "masked"),
    "update": ("joint", "alternating"),
    "metric": ("moment", "compensated"),
}


@dataclass(frozen=True)
class Pbsp:
    """N:M binarization as in "Progressive Binarization with Semi-Structured Pruning for LLMs".

    Attributes:
        pattern: N of every M weights are kept.
        block: columns that are fitted together and share their coefficients.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
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
        seed: of the random score.

    Source: arXiv 2502.01705, Alg. 1 and eqs. 2-8; groups from STBLLM (arXiv 2408.01803) and BiLLM
    (arXiv 2402.04291). Where the paper is silent the defaults are this project's, see docs/method.md.
    """

    pattern: Pattern
    block: int = 128
    damping: float = 0.01
    score: str = RESIDUAL
    steps: str = "stepwise"
    updates: int = 2
    update: str = "joint"
    refresh: bool = True
    target: str = "full"
    metric: str = "moment"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
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
        self.pattern.check(weight.shape[1])
        hessian = damped(moment, self.damping)
        factor = inverse_factor(hessian).to(weight.dtype)
        hessian = hessian.to(weight.dtype)
        energy = moment.diagonal().to(weight.dtype)
        fits: list[BlockFit] = []

        def approximate(target: Tensor, columns: slice, compensated: Tensor) -> Tensor:
            metric = compensated if self.metric == "compensated" else hessian[columns, columns]
            inputs = ScoreInputs(target, energy[columns], factor.diagonal()[columns], self.seed + len(fits))
            fit = self._fit_block(target, metric, inputs)
            # What is stored is float16: the columns to come absorb its rounding, too.
            fits.append(replace(fit, coefficients=fit.coefficients.half().to(target.dtype)))
            return fits[-1].dense()

        compensated_sweep(weight, factor, approximate, block=self.block)
        return self._joined(fits)

    def _fit_block(self, target: Tensor, metric: Tensor, inputs: ScoreInputs) -> BlockFit:
        """SPBO on one block: a partition from the weights that will stay, then prune and refit in steps."""
        kept, group = self.pattern.kept, self.pattern.group
        saliency = hessian(inputs)
        scores = saliency if self.score == RESIDUAL else SCORES[self.score](inputs)
        final = keep_largest(scores, kept, group)
        salient = salient_columns(target, final, saliency)
        groups = trisect(target, final & ~salient)
        fit = BlockFit.start(target, final, salient, groups)
        if self.steps == "one-shot":
            return self._update(fit.refit(target, metric), target, metric)
        fit = replace(fit, keep=torch.ones_like(final))
        fit = self._update(fit.refit(target, metric), target, metric)
        for count in range(group - 1, kept - 1, -1):
            if self.score == RESIDUAL:
                scores = removal_cost(target, fit.dense(), metric)
            keep = keep_largest(scores, count, group, among=fit.keep)
            fit = self._update(replace(fit, keep=keep), target, metric)
        return fit

    def _update(self, fit: BlockFit, target: Tensor, metric: Tensor) -> BlockFit:
        """τ rounds of sign refresh and coefficient update."""
        for _ in range(self.updates):
            if self.refresh:
                fit = fit.refresh(target)
            wanted = target * fit.keep if self.target == "masked" else target
            fit = fit.refit(wanted, metric, alternations=0 if self.update == "joint" else 1)
        return fit

    def _joined(self, fits: list[BlockFit]) -> GroupedBinarization:
        """The blocks side by side, in the stored representation."""
        keep = torch.cat([fit.keep for fit in fits], 1)
        salient = torch.cat([fit.salient for fit in fits])
        signs = torch.cat([fit.signs for fit in fits], 1)
        residual_signs = torch.cat([fit.residual_signs for fit in fits], 1)
        groups = torch.cat([fit.groups for fit in fits], 1)
        # Signs are held as ±1 everywhere; only those of kept weights are stored.
        return GroupedBinarization(
            pattern=self.pattern,
            signs=(signs * keep).to(torch.int8),
            residual_signs=(residual_signs * (keep & salient)).to(torch.int8),
            groups=torch.where(keep & ~salient, groups, 0).to(torch.uint8),
            salient=salient[None],
            scalars=torch.stack([fit.coefficients for fit in fits], 1).float(),
            block=self.block,
        )
