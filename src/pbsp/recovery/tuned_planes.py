"""A linear layer of planes whose scales, and codes, can be tuned, and stay what the file can hold."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from pbsp.binarization.codebook import nearest_vectors
from pbsp.binarization.planes import Planes, block_count, expand_scales, signs_of
from pbsp.binarization.rotation import rotate
from pbsp.binarization.scales import round_scales
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import PlanePattern
from pbsp.recovery.tuned_linear import LARGEST_LATENT, THRESHOLD_MARGIN, TunedLinear

_HALVINGS = 3  # then what still has another nearest vector begins at its own
_THRESHOLD = 0.5  # of a scale: below half of it, leaving a weight out is nearer than keeping it


class TunedPlanes(TunedLinear):
    """A linear layer of planes.

    A plane's signs and support follow from its latents: of every M those N are kept that are largest, with
    their signs. A scale can turn negative: its signs then turn when it is stored.

    Attributes:
        change: of scales, relative; where planes share scales, of the first plane's.
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
        """With `original`, the weight that the planes stand for, codes are tuned too."""
        super().__init__(planes.dense(), bias, conv1d=conv1d)
        self._planes = planes
        self._signs = planes.signs
        kinds = 1 if planes.shared_scales else len(planes.scales)
        self.change = nn.Parameter(torch.zeros_like(planes.scales[:kinds]))
        self.latents = None if original is None else nn.Parameter(first_latents(planes, original))

    def changes(self) -> list[nn.Parameter]:
        """One tensor."""
        return [self.change]

    def codes(self) -> list[nn.Parameter]:
        """One tensor, or none."""
        return [] if self.latents is None else [self.latents]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make `weight` what scales and codes are now."""
        if self.latents is not None:
            pairs = zip(self.latents, self._planes.patterns, strict=True)
            self._signs = torch.stack([codes_of(latents, pattern) for latents, pattern in pairs])
        super().refresh()

    def _pull(self, gradient: Float[Tensor, "out in"]) -> None:
        gradient = rotate(gradient, self._planes.rotation)
        _, rows, blocks = self.change.shape
        block, columns = self._planes.scale_block, gradient.shape[1]
        missing = block_count(columns, block) * block - columns
        for plane, signs in enumerate(self._signs):
            products = gradient * signs
            if missing:
                products = torch.nn.functional.pad(products, (0, missing))
            sums = products.view(rows, blocks, block).sum(2) * self._planes.scales[plane]
            _add_gradient(self.change, min(plane, len(self.change) - 1), sums)
            if self.latents is not None:
                scales = expand_scales(self._scales()[plane], block, columns)
                _add_gradient(self.latents, plane, gradient * scales)

    @torch.no_grad()
    def representation(self) -> Planes:
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
    can turn it; of a lattice, somewhere between the two.
    """
    columns = planes.signs.shape[2]
    scales = expand_scales(planes.scales, planes.scale_block, columns)
    left = rotate(original.float(), planes.rotation) - planes.rotated()
    latents, left_out = [], _THRESHOLD - THRESHOLD_MARGIN
    for signs, scale, pattern in zip(planes.signs, scales, planes.patterns, strict=True):
        wanted = torch.where(scale > 0, left / scale.clamp_min(1e-30), 0.0) + signs
        if isinstance(pattern, Lattice):
            latents.append(_drawn_to(signs.float(), wanted, pattern))
            continue
        kept = signs * (signs * wanted).clamp(_THRESHOLD + THRESHOLD_MARGIN, LARGEST_LATENT)
        latents.append(torch.where(signs != 0, kept, wanted.clamp(-left_out, left_out)))
    return torch.stack(latents)


def _drawn_to(vectors: Tensor, wanted: Tensor, lattice: Lattice) -> Tensor:
    """`wanted`, each group drawn halfway to its vector until that is the nearest one."""
    own, latents = vectors.reshape(-1, lattice.group), wanted.reshape(-1, lattice.group)
    for halving in range(_HALVINGS + 1):
        other = (codes_of(latents, lattice) != own).any(1, keepdim=True)
        latents = torch.where(other, own if halving == _HALVINGS else (latents + own) / 2, latents)
    return latents.view_as(wanted)


def codes_of(latents: Float[Tensor, "out in"], pattern: PlanePattern) -> Int8[Tensor, "out in"]:
    """The signs of the N largest of every M consecutive entries, 0 for the others; of E8 the nearest."""
    if isinstance(pattern, Lattice):
        return nearest_vectors(latents, pattern).to(torch.int8)
    keep = keep_largest(latents.abs(), pattern.kept, pattern.group)
    return torch.where(keep, signs_of(latents), 0.0).to(torch.int8)


def _add_gradient(parameter: nn.Parameter, plane: int, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[plane] += gradient
