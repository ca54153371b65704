"""A linear layer of planes whose scales, and codes, can be tuned, and stay what the file can hold."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from pbsp.binarization.planes import Planes, block_count, expand_scales, signs_of
from pbsp.binarization.rotation import rotate
from pbsp.binarization.scales import round_scales
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern

_THRESHOLD = 0.5  # of a scale: below half of it, leaving a weight out is nearer than keeping it
_LARGEST = 1.5  # of a scale: no weight shall need many steps to be left out
_MARGIN = 0.02  # of a scale: all those on the threshold would turn in the first step


class TunedPlanes(nn.Module):
    """Y = x Wᵀ + bias, where W is what the planes stand for after the last `refresh`.

    Scales are `first · (1 + change)`. A plane's signs and support follow from `latents`, in units of its
    scales: of every M those N are kept that are largest, with their signs. Both are rounded in `refresh`
    and the gradient passes the rounding as if it were not there (straight-through): `pull` takes it from
    W's, so that codes are found once a step, however many windows or checkpoints a step has. A scale can
    turn negative: its signs then turn when it is stored.

    Attributes:
        weight: W, a leaf of the graph; its gradient is what `pull` uses up.
        change: relative, so that one step size fits all layers; zero at first.
        latents: None where codes stay as they are.
    """

    def __init__(
        self,
        planes: Planes,
        bias: Float[Tensor, "out"] | None,
        *,
        original: Float[Tensor, "out in"] | None = None,
        conv1d: bool = False,
    ) -> None:
        """With `original`, the weight that the planes stand for, codes are tuned too.

        `conv1d` is what `PackedLinear` says of itself.
        """
        super().__init__()
        self.conv1d = conv1d
        self._planes = planes
        self._signs = planes.signs
        self.change = nn.Parameter(torch.zeros_like(planes.scales))
        self.latents = None if original is None else nn.Parameter(first_latents(planes, original))
        self.weight = nn.Parameter(planes.dense())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make `weight` what scales and codes are now."""
        if self.latents is not None:
            pairs = zip(self.latents, self._planes.patterns, strict=True)
            self._signs = torch.stack([codes_of(latents, pattern) for latents, pattern in pairs])
        self.weight.copy_(self.planes().dense())

    @torch.no_grad()
    def pull(self) -> None:
        """Turn the gradient of `weight`, none where it was not called, into those of scales and codes."""
        if self.weight.grad is None:
            return
        gradient = rotate(self.weight.grad, self._planes.rotation)
        _, rows, blocks = self.change.shape
        block, columns = self._planes.scale_block, gradient.shape[1]
        missing = block_count(columns, block) * block - columns
        for plane, signs in enumerate(self._signs):
            products = torch.nn.functional.pad(gradient * signs, (0, missing))
            sums = products.view(rows, blocks, block).sum(2) * self._planes.scales[plane]
            _set_gradient(self.change, plane, sums)
            if self.latents is not None:
                scales = expand_scales(self._scales()[plane], block, columns)
                _set_gradient(self.latents, plane, gradient * scales)
        self.weight.grad = None

    @torch.no_grad()
    def planes(self) -> Planes:
        """The planes as they are now, with scales that can be stored."""
        scales = self._scales()
        block, columns = self._planes.scale_block, self._signs.shape[2]
        signs = self._signs
        if bool((scales < 0).any()):
            signs = signs * expand_scales(signs_of(scales), block, columns).to(torch.int8)
        return replace(self._planes, signs=signs.contiguous(), scales=scales.abs())

    def _scales(self) -> Float[Tensor, "planes out blocks"]:
        wanted = self._planes.scales * (1 + self.change.detach())
        return round_scales(wanted.abs()) * signs_of(wanted)


def first_latents(planes: Planes, original: Float[Tensor, "out in"]) -> Float[Tensor, "planes out in"]:
    """Latents that give the planes' codes, and else say what the other planes leave of the original.

    Where that and a code disagree the latent lies near the threshold on the code's side, where some steps
    can turn it.
    """
    columns = planes.signs.shape[2]
    scales = expand_scales(planes.scales, planes.scale_block, columns)
    left = rotate(original.float(), planes.rotation) - planes.rotated()
    latents = []
    for signs, scale in zip(planes.signs, scales, strict=True):
        wanted = torch.where(scale > 0, left / scale.clamp_min(1e-30), 0.0) + signs
        kept = signs * (signs * wanted).clamp(_THRESHOLD + _MARGIN, _LARGEST)
        latents.append(
            torch.where(signs != 0, kept, wanted.clamp(_MARGIN - _THRESHOLD, _THRESHOLD - _MARGIN))
        )
    return torch.stack(latents)


def codes_of(latents: Float[Tensor, "out in"], pattern: Pattern) -> Int8[Tensor, "out in"]:
    """The signs of the N largest of every M consecutive entries, 0 for the others."""
    keep = keep_largest(latents.abs(), pattern.kept, pattern.group)
    return torch.where(keep, signs_of(latents), 0.0).to(torch.int8)


def _set_gradient(parameter: nn.Parameter, plane: int, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[plane] = gradient
