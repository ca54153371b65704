"""Method `rtn`: one bit a weight by the base binarizer, no calibration."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.methods.blockwise import join_fits, stored
from pbsp.methods.checks import check_blocks

PLAIN = Scheme(groups=1, salient_groups=0)


@dataclass(frozen=True)
class Rtn:
    """α·sign(w − μ) + μ per row and block, μ the mean of w and α that of |w − μ|.

    Attributes:
        block: columns that share α and μ.

    Source: arXiv 2502.01705, eq. 1; after XNOR-Net (arXiv 1603.05279).
    """

    rows_interact: ClassVar[bool] = False
    block: int = 128

    def __post_init__(self) -> None:
        check_blocks(self.block, 1.0)

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> GroupedBinarization:
        """The binarized weight; the moment is not looked at."""
        fits = [stored(plain_fit(part, torch.ones_like(part) > 0)) for part in weight.split(self.block, 1)]
        return join_fits(fits, pattern=None, block=self.block)


def plain_fit(weight: Tensor, keep: Tensor) -> BlockFit:
    """The base binarizer on the kept weights of one block, all of them one group."""
    groups = torch.zeros_like(keep, dtype=torch.uint8)
    return BlockFit.start(weight, keep, torch.zeros_like(keep[0]), groups, PLAIN)
