"""What the binarizations by blocks of columns share: PBSP, and the methods it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.binarization.partition import magnitude_groups, salient_columns
from pbsp.pruning.pattern import Pattern
from pbsp.pruning.scores import ScoreInputs, hessian
from pbsp.solver.compensation import compensated_sweep
from pbsp.solver.hessian import damped, inverse_factor


@dataclass(frozen=True)
class BlockProblem:
    """One block of columns, as a method sees it.

    Attributes:
        inputs: what scores look at; `inputs.weight` is the target, moved by the blocks before.
        columns: where the block stands in the matrix.
        metric: its part of the damped hessian.
        compensated: what an error here costs after later columns have absorbed what they can.
    """

    inputs: ScoreInputs
    columns: slice
    metric: Float[Tensor, "block block"]
    compensated: Float[Tensor, "block block"]


def fit_blocks(
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    fit_block: Callable[[BlockProblem], BlockFit],
    *,
    pattern: Pattern | None,
    block: int,
    damping: float,
    compensation: str,
    seed: int = 0,
) -> GroupedBinarization:
    """Fit block after block from left to right; later blocks absorb the error of those before.

    Args:
        fit_block: the method's own part.
        pattern: the N:M that `fit_block` keeps; None if it keeps no such pattern.
        block: columns per call.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        compensation: see `compensated_sweep`.
        seed: of the random score; the blocks draw differently.

    Raises:
        PatternError: the pattern does not tile a row.
        CalibrationError: the moment is not finite or, damped, not positive definite.
    """
    if pattern is not None:
        pattern.check(weight.shape[1])
    whole = damped(moment, damping)
    factor = inverse_factor(whole).to(weight.dtype)
    whole = whole.to(weight.dtype)
    energy = moment.diagonal().to(weight.dtype)
    fits: list[BlockFit] = []

    def approximate(target: Tensor, columns: slice, compensated: Tensor) -> Tensor:
        inputs = ScoreInputs(target, energy[columns], factor.diagonal()[columns], seed + len(fits))
        fit = fit_block(BlockProblem(inputs, columns, whole[columns, columns], compensated))
        fits.append(stored(fit))
        return fits[-1].dense()

    compensated_sweep(weight, factor, approximate, block=block, mode=compensation)
    return join_fits(fits, pattern=pattern, block=block)


def partitioned_fit(problem: BlockProblem, keep: Tensor, scheme: Scheme) -> BlockFit:
    """The base binarizer on salient columns and magnitude groups, searched on the kept weights."""
    target = problem.inputs.weight
    salient = salient_columns(target, keep, hessian(problem.inputs))
    groups = magnitude_groups(target, keep & ~salient, groups=scheme.groups)
    if scheme.salient_groups > 1:
        inside = magnitude_groups(target, keep & salient, groups=scheme.salient_groups)
        groups = torch.where(salient, inside, groups)
    return BlockFit.start(target, keep, salient, groups, scheme)


def stored(fit: BlockFit) -> BlockFit:
    """The fit with its coefficients in float16, as they are stored: later blocks absorb the rounding, too."""

    def rounded(values: Tensor) -> Tensor:
        return values.half().to(values.dtype)

    factors = None if fit.column_scales is None else rounded(fit.column_scales)
    return replace(fit, coefficients=rounded(fit.coefficients), column_scales=factors)


def join_fits(fits: list[BlockFit], *, pattern: Pattern | None, block: int) -> GroupedBinarization:
    """The blocks side by side. Fits hold ±1 everywhere; only what kept weights need is stored."""
    keep = torch.cat([fit.keep for fit in fits], 1)
    salient = torch.cat([fit.salient for fit in fits])
    signs = torch.cat([fit.signs for fit in fits], 1)
    residual_signs = torch.cat([fit.residual_signs for fit in fits], 1)
    groups = torch.cat([fit.groups for fit in fits], 1)
    factors = [fit.column_scales for fit in fits if fit.column_scales is not None]
    return GroupedBinarization(
        pattern=pattern,
        signs=(signs * keep).to(torch.int8),
        residual_signs=(residual_signs * (keep & salient)).to(torch.int8),
        groups=torch.where(keep, groups, 0).to(torch.uint8),
        salient=salient[None],
        scalars=torch.stack([fit.coefficients for fit in fits], 1).float(),
        block=block,
        scheme=fits[0].scheme,
        column_scales=torch.cat(factors, 1)[None].float() if factors else None,
    )
