"""A linear layer of planes whose scales can be tuned, and stay what the file can hold."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.binarization.planes import Planes, block_count, signs_of
from pbsp.binarization.scales import round_scales


class TunedPlanes(nn.Module):
    """Y = x Wᵀ + bias; W's signs are fixed, its scales are `first · (1 + change)`.

    The product sees the scales as they would be stored; the gradient passes the rounding as if it were not
    there (straight-through). A scale can turn negative: its signs then turn when it is stored.

    Attributes:
        change: the parameter, relative, so that one step size fits all layers; zero at first.
    """

    def __init__(self, planes: Planes, bias: Float[Tensor, "out"] | None) -> None:
        super().__init__()
        self._planes = planes
        count, rows, columns = planes.signs.shape
        blocks = block_count(columns, planes.scale_block)
        padding = blocks * planes.scale_block - columns
        padded = torch.nn.functional.pad(planes.signs, (0, padding))
        self._signs = padded.view(count, rows, blocks, planes.scale_block)
        self._columns = columns
        self.change = nn.Parameter(torch.zeros_like(planes.scales))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def _scales(self) -> Float[Tensor, "planes out blocks"]:
        wanted = self._planes.scales * (1 + self.change)
        stored = round_scales(wanted.detach().abs()) * signs_of(wanted.detach())
        return wanted + (stored - wanted).detach()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product with the stored scales, in x's dtype."""
        scales = self._scales()[..., None]
        weight = (self._signs * scales).sum(0).flatten(1)[:, : self._columns]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    @torch.no_grad()
    def planes(self) -> Planes:
        """The planes with the tuned scales, as they are stored."""
        scales = self._scales()
        turned = signs_of(scales)[..., None].to(torch.int8) * self._signs
        signs = turned.flatten(2)[..., : self._columns].contiguous()
        return Planes(self._planes.patterns, signs, scales.abs(), self._planes.scale_block)
