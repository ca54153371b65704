"""Random valid representations of layout `paper`."""

import torch

from pbsp.binarization.grouped import PAPER, GroupedBinarization
from pbsp.binarization.planes import block_count
from pbsp.pruning.pattern import Pattern
from random_planes import random_planes, random_signs


def random_grouped(
    text: str,
    rows: int,
    columns: int,
    *,
    block: int = 48,
    parts: int = 1,
    salient_share: float = 0.2,
    seed: int = 0,
) -> GroupedBinarization:
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern.parse(text)
    signs = random_signs(pattern, rows, columns, seed=seed)
    salient = torch.rand(parts, columns, generator=generator) < salient_share
    kept, twice = signs != 0, salient.repeat_interleave(rows // parts, 0)
    residual_signs = 2 * torch.randint(0, 2, signs.shape, generator=generator).to(torch.int8) - 1
    groups = torch.randint(0, PAPER.groups, signs.shape, generator=generator).to(torch.uint8)
    scalars = 0.1 * torch.randn(rows, block_count(columns, block), PAPER.scalars, generator=generator)
    return GroupedBinarization(
        pattern, signs, residual_signs * (kept & twice), groups * (kept & ~twice), salient,
        scalars.half().float(), block,
    )  # fmt: skip


def alternating(text: str, rows: int, columns: int, *, seed: int):
    """Planes or the grouped form, by the seed's parity."""
    return (random_grouped if seed % 2 else random_planes)(text, rows, columns, seed=seed)
