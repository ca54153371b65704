"""Method `planes`: fit a sum of N:M binary planes to a weight under its inputs' moment."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.codebook import best_codes, nearest_vectors
from pbsp.binarization.planes import SCALE_BLOCK, Planes, block_count, even_block, expand_scales, signs_of
from pbsp.binarization.refinement import descend_codes, refit_scales
from pbsp.binarization.rotation import check_rotation, rotate, rotate_moment, rotation_for
from pbsp.binarization.scales import round_scales
from pbsp.methods.checks import check_blocks, check_sweeps
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import PlanePattern, parse_patterns
from pbsp.solver.compensation import compensated_sweep
from pbsp.solver.hessian import damped, inverse_factor

_TURNS = 2  # of the planes of a group in the first sweep; a third changes the error by under 1 %


@dataclass(frozen=True)
class PlaneFit:
    """Binary planes by a compensated sweep over M-groups, then coordinate descent under the whole hessian.

    Attributes:
        patterns: N:M of each plane, the coarse one first.
        block: most columns that share one scale; a row is divided evenly, see `even_block`.
        damping: ridge added to the moment, as a fraction of its mean diagonal.
        sweeps: rounds of coordinate descent, each followed by a joint refit of all scales.
        rotation: size of the Hadamard matrices that weights and inputs are turned by, a power of four, or
            the largest that divides the row; 1: none.

    Source: method.md §9 of this project, after SPBO (arXiv 2502.01705, Alg. 1): the support is chosen
    again with the signs whenever a group is visited.
    """

    rows_interact: ClassVar[bool] = False
    weighting: ClassVar[str] = "attention"
    patterns: tuple[PlanePattern, ...] = parse_patterns("e8-12+e8-8")
    block: int = SCALE_BLOCK
    damping: float = 0.01
    sweeps: int = 3
    rotation: int = 64

    def __post_init__(self) -> None:
        check_blocks(self.block, self.damping, *self.patterns)
        check_rotation(self.rotation)
        check_sweeps(self.sweeps)

    def compress(self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]) -> Planes:
        """Planes that minimise tr(R S Rᵀ), R = W − Q, for the moment S of the layer's inputs.

        Raises:
            PatternError: a pattern does not tile a row.
            CalibrationError: the moment is not finite or, damped, not positive definite.
        """
        for pattern in self.patterns:
            pattern.check(weight.shape[1])
        block = even_block(weight.shape[1], self.block, *(pattern.group for pattern in self.patterns))
        rotation = rotation_for(weight.shape[1], self.rotation)
        weight = rotate(weight, rotation)
        hessian = rotate_moment(damped(moment, self.damping), rotation)
        factor = inverse_factor(hessian).to(weight.dtype)
        hessian = hessian.to(weight.dtype)
        scales = self._first_scales(weight, block)
        signs = self._compensated_codes(weight, factor, scales, block)
        signs, scales = self._refit(weight, signs, hessian, block)
        for _ in range(self.sweeps):
            signs = descend_codes(weight, signs, scales, hessian, patterns=self.patterns, scale_block=block)
            signs, scales = self._refit(weight, signs, hessian, block)
        return Planes(self.patterns, signs.to(torch.int8), scales.float(), block, rotation)

    def _first_scales(self, weight: Tensor, block: int) -> Tensor:
        """Each plane's best scales for the nearest codes, on the residual of the planes before it.

        For N:M that is the mean magnitude of what is kept.
        """
        columns = weight.shape[1]
        padding = block_count(columns, block) * block - columns
        residual = weight
        scales = []
        for pattern in self.patterns:
            signs = _nearest(residual, pattern, block)
            pairs = torch.stack([residual * signs, signs.square()])
            totals = torch.nn.functional.pad(pairs, (0, padding)).view(2, len(weight), -1, block).sum(-1)
            scales.append(totals[0] / totals[1].clamp_min(1))
            residual = residual - signs * expand_scales(scales[-1], block, columns)
        return torch.stack(scales)

    def _compensated_codes(self, weight: Tensor, factor: Tensor, scales: Tensor, block: int) -> Tensor:
        """Codes under fixed scales, group after group, later columns absorbing each group's error."""
        codes = weight.new_zeros(len(self.patterns), weight.shape[1], len(weight))  # columns first
        turns = 1 if len(self.patterns) == 1 else _TURNS

        def approximate(target: Tensor, columns: slice, metric: Tensor) -> Tensor:
            residual = target.T.contiguous()
            for turn in range(turns):
                for plane, pattern in enumerate(self.patterns):
                    for low in range(columns.start, columns.stop, pattern.group):
                        group = slice(low, low + pattern.group)
                        near = slice(low - columns.start, group.stop - columns.start)
                        scale = scales[plane, :, low // block].contiguous()
                        old = codes[plane, group]
                        correlation = metric[near] @ residual + metric[near, near] @ (old * scale)
                        best = best_codes(
                            correlation, metric[near, near], scale, pattern, start=old if turn else None
                        )
                        residual[near] -= (best - old) * scale
                        codes[plane, group] = best
            return target - residual.T

        compensated_sweep(weight, factor, approximate, block=math.lcm(*(p.group for p in self.patterns)))
        return codes.transpose(1, 2)

    def _refit(self, weight: Tensor, signs: Tensor, hessian: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Joint scales, made non-negative by turning their signs, rounded to the stored format."""
        scales = refit_scales(weight, signs, hessian, block)
        signs = signs * expand_scales(signs_of(scales), block, weight.shape[1])
        return signs, round_scales(scales.abs()).to(weight.dtype)


def _nearest(weight: Tensor, pattern: PlanePattern, block: int) -> Tensor:
    """The code nearest to every group: of N:M at whatever scale is best, of a lattice at a usual one."""
    grouped = weight.view(len(weight), -1, pattern.group)
    if not isinstance(pattern, Lattice):
        kept = grouped.abs().topk(pattern.kept, dim=2).indices
        signs = torch.zeros_like(grouped).scatter_(2, kept, signs_of(grouped.gather(2, kept)))
        return signs.view_as(weight)
    columns = weight.shape[1]
    whole = torch.nn.functional.pad(weight.square(), (0, block_count(columns, block) * block - columns))
    spread = whole.view(len(weight), -1, block).mean(2).sqrt().clamp_min(1e-30)
    return nearest_vectors(weight / expand_scales(spread * pattern.first_scale, block, columns), pattern)
