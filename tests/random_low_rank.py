"""Random matrices of two sign factors."""

import torch

from pbsp.binarization.low_rank import LowRankBinary


def random_signs(rows, columns, generator):
    return (2 * torch.randint(0, 2, (rows, columns), generator=generator) - 1).to(torch.int8)


def random_low_rank(rows, columns, rank, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankBinary(
        row_signs=random_signs(rows, rank, generator),
        column_signs=random_signs(columns, rank, generator),
        row_scales=(torch.rand(rows, generator=generator) + 0.5).half().float(),
        column_scales=(torch.rand(columns, generator=generator) + 0.5).half().float(),
    )
