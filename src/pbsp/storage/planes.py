"""Layout `planes`: `Planes` as bytes, both directions and bit-exact; docs/format.md spells the layout out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from pbsp.binarization.planes import Planes, block_count, even_block, expand_scales
from pbsp.binarization.scales import decode_scales, encode_scales, scale_offsets
from pbsp.errors import FormatError
from pbsp.pruning.pattern import Pattern, PlanePattern, format_patterns
from pbsp.storage.bits import CODES, TensorSpec, check_rotated, rotated
from pbsp.storage.packing import check_codes, pack_signs, row_bytes, unpack_signs

SCALES = "weight_scale"
OFFSETS = "weight_scale_offset"


@dataclass(frozen=True)
class PlanesForm:
    """What must be known of a linear in layout `planes` to read its tensors.

    Attributes:
        patterns: of each plane.
        scale_block: columns that share a scale.
        rotation: see `Planes`.
        shared_scales: see `Planes`.

    Raises:
        PatternError: a pattern does not tile the rows.
        FormatError: the rows cannot be rotated so, or planes that prune share scales.
    """

    layout: ClassVar[str] = "planes"
    patterns: tuple[PlanePattern, ...]
    in_features: int
    out_features: int
    scale_block: int
    rotation: int = 1
    shared_scales: bool = False

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            pattern.check(self.in_features)
        check_rotated(self.in_features, self.rotation)
        if self.shared_scales and not all(_is_dense(pattern) for pattern in self.patterns):
            raise FormatError(f"planes {format_patterns(self.patterns)} share scales; only dense ones can")

    @staticmethod
    def even(
        patterns: tuple[PlanePattern, ...],
        in_features: int,
        out_features: int,
        most: int,
        *,
        shared_scales: bool = False,
    ) -> "PlanesForm":
        """With a scale for at most so many columns, see `even_block`. Not rotated: that takes no bits."""
        block = even_block(in_features, most, *(pattern.group for pattern in patterns))
        return PlanesForm(patterns, in_features, out_features, block, shared_scales=shared_scales)

    def __str__(self) -> str:
        sizes = f"{self.out_features}x{self.in_features}/{self.scale_block}"
        shared = " shared" if self.shared_scales else ""
        return f"{self.layout} {format_patterns(self.patterns)} {sizes}{rotated(self.rotation)}{shared}"

    @property
    def plane_bytes(self) -> list[int]:
        """Bytes of a row's codes in each plane."""
        return [row_bytes(pattern, self.in_features) for pattern in self.patterns]

    @property
    def blocks(self) -> int:
        """Scale blocks of a row."""
        return block_count(self.in_features, self.scale_block)

    @property
    def label(self) -> str:
        """As plans and reports write it."""
        return f"{len(self.patterns)} bit" if self.shared_scales else format_patterns(self.patterns)

    def specs(self) -> dict[str, TensorSpec]:
        """The stored tensors by the last part of their names, in the order of `PackedPlanes`; no bias."""
        rows, kinds = self.out_features, 1 if self.shared_scales else len(self.patterns)
        return {
            CODES: TensorSpec((rows, sum(self.plane_bytes)), torch.uint8, "plane codes"),
            SCALES: TensorSpec((rows, kinds * self.blocks), torch.uint8, "plane scales"),
            OFFSETS: TensorSpec((kinds,), torch.int8, "plane scales"),
        }

    def packed(self, tensors: Mapping[str, Tensor]) -> "PackedPlanes":
        """The packed planes whose stored tensors are `tensors`."""
        return PackedPlanes(self, *(tensors[name] for name in self.specs()))

    def nominal_bits(self, read: Callable[[str], Tensor]) -> float:
        """Bits per weight as the papers count them, one per kept weight: ΣN/M; 0.75 for 4:8+2:8."""
        return sum(pattern.nominal_bits for pattern in self.patterns)


@dataclass(frozen=True)
class PackedPlanes:
    """The stored form of `Planes`.

    Attributes:
        codes: per row, the padded code bytes of plane 0, then plane 1…
        scales: per row, the E3M5 codes of plane 0's blocks, then plane 1's…; plane 0's alone where planes
            share them.
        offsets: exponent offset of each plane's scales, or of plane 0's.
    """

    form: PlanesForm
    codes: UInt8[Tensor, "out row_bytes"]
    scales: UInt8[Tensor, "out plane_blocks"]
    offsets: Int8[Tensor, "planes"]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names."""
        return dict(zip(self.form.specs(), (self.codes, self.scales, self.offsets), strict=True))

    def rows(self, low: int, high: int) -> "PackedPlanes":
        """The same matrix cut to rows low…high, without a copy."""
        form = replace(self.form, out_features=high - low)
        return PackedPlanes(form, self.codes[low:high], self.scales[low:high], self.offsets)

    def unpack(self) -> Planes:
        """The planes; float32 scales, exact."""
        planes = list(self._planes())
        signs = torch.stack([signs for signs, _ in planes])
        scales = torch.stack([scales for _, scales in planes])
        form = self.form
        return Planes(form.patterns, signs, scales, form.scale_block, form.rotation, form.shared_scales)

    @torch.no_grad()
    def decode(self) -> Float[Tensor, "out in"]:
        """All rows in float32, summed in plane order: equal to `Planes.rotated`, bit for bit."""
        form = self.form
        total = None
        for signs, scales in self._planes():
            plane = signs.to(torch.float32)
            if form.in_features == form.blocks * form.scale_block:  # three times faster than a scale for each
                plane.view(-1, form.blocks, form.scale_block).mul_(scales[:, :, None])
            else:
                plane *= expand_scales(scales, form.scale_block, form.in_features)
            total = plane if total is None else total.add_(plane)
        assert total is not None, "there is at least one plane"
        return total

    def check(self) -> None:
        """Raise FormatError unless every code, padding bit and scale has a meaning.

        Shapes and dtypes must have been checked. Run once when a file is read: decoding trusts its input.
        """
        columns = self.codes.split(self.form.plane_bytes, 1)
        for number, (codes, pattern) in enumerate(zip(columns, self.form.patterns, strict=True)):
            check_codes(codes, pattern, self.form.in_features, f"plane {number}")
        for number, offset in enumerate(self.offsets.tolist()):
            largest = decode_scales(torch.full((1, 1), 255, dtype=torch.uint8), offset)
            if not bool(torch.isfinite(largest)):
                raise FormatError(f"plane {number} has scale offset {offset}: its scales exceed float32")

    def _planes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Signs and scales, plane by plane."""
        form = self.form
        parts, offsets = list(self.scales.split(form.blocks, 1)), self.offsets.tolist()
        if form.shared_scales:
            planes = range(len(form.patterns))
            parts, offsets = [parts[0] for _ in planes], [offsets[0] - plane for plane in planes]
        for codes, pattern, scales, offset in zip(
            self.codes.split(form.plane_bytes, 1), form.patterns, parts, offsets, strict=True
        ):
            yield unpack_signs(codes, pattern, form.in_features), decode_scales(scales, offset)


def pack_planes(planes: Planes) -> PackedPlanes:
    """The stored bytes of `planes`; `unpack` gives back the same signs and scales.

    Raises:
        PatternError: a pattern does not tile the rows.
    """
    _, rows, columns = planes.signs.shape
    form = PlanesForm(
        planes.patterns, columns, rows, planes.scale_block, planes.rotation, planes.shared_scales
    )
    codes = [pack_signs(signs, pattern) for pattern, signs in zip(planes.patterns, planes.signs, strict=True)]
    kept = planes.scales[:1] if planes.shared_scales else planes.scales
    offsets = scale_offsets(kept)
    scales = [encode_scales(plane, offset) for plane, offset in zip(kept, offsets.tolist(), strict=True)]
    packed = PackedPlanes(form, torch.cat(codes, 1), torch.cat(scales, 1), offsets.to(planes.signs.device))
    decoded = torch.stack([scales for _, scales in packed._planes()])
    assert torch.equal(decoded, planes.scales), "scales were not rounded to the stored format"
    return packed


def _is_dense(pattern: PlanePattern) -> bool:
    return isinstance(pattern, Pattern) and pattern.kept == pattern.group
