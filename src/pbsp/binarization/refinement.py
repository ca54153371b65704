"""Refinement of a sum of planes under the layer's hessian: joint scales, codes one group at a time."""

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.codebook import best_codes
from pbsp.binarization.planes import block_count, expand_scales
from pbsp.pruning.pattern import PlanePattern

_SYSTEM_BYTES = 64 << 20  # normal equations alive at once in `refit_scales`
_PANEL = 128  # columns after which the others' gradients are brought up to date at once
_RIDGE = 1e-6  # of the mean diagonal: keeps two planes that agree in a block solvable


def refit_scales(
    weight: Float[Tensor, "out in"],
    signs: Float[Tensor, "planes out in"],
    hessian: Float[Tensor, "in in"],
    scale_block: int,
) -> Float[Tensor, "planes out blocks"]:
    """The least-squares scales of all planes and blocks of a row at once; they may be negative.

    Minimises (w − Σ_k a_k b_k) H (w − Σ_k a_k b_k)ᵀ per row, b_k the signs of one plane in one
    block: the α update of the paper's eqs. 3-4, solved jointly instead of in turns.
    """
    planes, rows, columns = signs.shape
    blocks = block_count(columns, scale_block)
    unknowns = planes * blocks
    chunk = max(1, _SYSTEM_BYTES // (8 * unknowns**2))
    solved = []
    for low in range(0, rows, chunk):
        # Codes come columns first; products with them strided take twice as long.
        part = signs[:, low : low + chunk].contiguous()
        system, right = _normal_equations(weight[low : low + chunk], part, hessian, scale_block)
        system.diagonal(dim1=1, dim2=2).add_(
            _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30
        )
        solved.append(torch.linalg.solve(system.double(), right.double()).to(weight.dtype))
    return torch.cat(solved).view(rows, planes, blocks).transpose(0, 1).contiguous()


def _normal_equations(
    weight: Tensor, signs: Tensor, hessian: Tensor, scale_block: int
) -> tuple[Tensor, Tensor]:
    """b_i H b_jᵀ (rows, unknowns, unknowns) and w H b_iᵀ (rows, unknowns); unknowns in plane, block order."""
    planes, rows, columns = signs.shape
    blocks = block_count(columns, scale_block)
    right = _block_sums((weight @ hessian) * signs, scale_block)
    system = weight.new_empty(rows, planes, blocks, planes, blocks)
    for block in range(blocks):
        start, stop = block * scale_block, min((block + 1) * scale_block, columns)
        for plane in range(planes):
            # The system is symmetric: only the blocks from this one on are computed.
            seen = signs[plane, :, start:stop] @ hessian[start:stop, start:]
            sums = _block_sums(seen * signs[:, :, start:], scale_block).transpose(0, 1)
            system[:, plane, block, :, block:] = sums
            system[:, :, block:, plane, block] = sums
    unknowns = planes * blocks
    return system.view(rows, unknowns, unknowns), right.transpose(0, 1).reshape(rows, unknowns)


def _block_sums(values: Tensor, scale_block: int) -> Tensor:
    """Sums over the last dimension, block by block; the last block may be short."""
    whole = values.shape[-1] // scale_block * scale_block
    sums = values[..., :whole].unflatten(-1, (-1, scale_block)).sum(-1)
    if whole == values.shape[-1]:
        return sums
    return torch.cat([sums, values[..., whole:].sum(-1, keepdim=True)], -1)


def descend_integers(
    weight: Float[Tensor, "out in"],
    integers: Float[Tensor, "out in"],
    steps: Float[Tensor, "out blocks"],
    hessian: Float[Tensor, "in in"],
    *,
    largest: int,
    scale_block: int,
) -> Float[Tensor, "out in"]:
    """One sweep of coordinate descent: each column takes its best integers, all else fixed.

    The loss (w − q) H (w − q)ᵀ never rises: in one weight it is a parabola, so that the integer nearest to
    its lowest point is the best.

    Args:
        integers: odd, −largest to largest; q is an integer times the step of its row and block.
        steps: not negative.
        largest: odd.
    """
    columns = weight.shape[1]
    gradient = hessian @ (weight - integers * expand_scales(steps, scale_block, columns)).T
    found = integers.T.contiguous()  # columns first, as in `descend_codes`
    by_block = steps.T.contiguous()
    for start in range(0, columns, _PANEL):
        stop = min(start + _PANEL, columns)
        local = gradient[start:stop].clone()
        change = torch.empty_like(local)
        for column in range(start, stop):
            near, step = column - start, by_block[column // scale_block]
            lowest = found[column] + local[near] / (hessian[column, column] * step)
            nearest = (((lowest - 1) / 2).round() * 2 + 1).clamp(-largest, largest)
            best = torch.where(step > 0, nearest, found[column])
            change[near] = (best - found[column]) * step
            found[column] = best
            local[near + 1 :] -= hessian[column + 1 : stop, column, None] * change[near]
        gradient -= hessian[:, start:stop] @ change
    return found.T


def descend_codes(
    weight: Float[Tensor, "out in"],
    signs: Float[Tensor, "planes out in"],
    scales: Float[Tensor, "planes out blocks"],
    hessian: Float[Tensor, "in in"],
    *,
    patterns: tuple[PlanePattern, ...],
    scale_block: int,
) -> Float[Tensor, "planes out in"]:
    """One sweep of coordinate descent: each M-group of each plane takes its best code, all else fixed.

    The loss (w − q) H (w − q)ᵀ never rises, since the code in place is among the candidates.
    """
    columns = weight.shape[1]
    residual = weight - sum(signs * expand_scales(scales, scale_block, columns))
    # Columns first, so that a group is one contiguous piece (see `best_codes`).
    gradient = hessian @ residual.T
    codes = signs.transpose(1, 2).contiguous()
    block_scales = scales.transpose(1, 2).contiguous()
    for plane, pattern in enumerate(patterns):
        panel = max(_PANEL // pattern.group, 1) * pattern.group
        for start in range(0, columns, panel):
            stop = min(start + panel, columns)
            local = gradient[start:stop].clone()
            change = torch.empty_like(local)
            for low in range(start, stop, pattern.group):
                group = slice(low, low + pattern.group)
                near, later = slice(low - start, group.stop - start), slice(group.stop - start, None)
                scale = block_scales[plane, low // scale_block]
                metric = hessian[group, group]
                old = codes[plane, group]
                correlation = local[near] + metric @ (old * scale)
                best = best_codes(correlation, metric, scale, pattern, start=old)
                change[near] = (best - old) * scale
                codes[plane, group] = best
                local[later] -= hessian[group.stop : stop, group] @ change[near]
            gradient -= hessian[:, start:stop] @ change
    return codes.transpose(1, 2)
