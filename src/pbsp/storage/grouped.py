"""Layout `paper`: `GroupedBinarization` as bytes, both directions and bit-exact; see docs/format.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int16, UInt8
from torch import Tensor

from pbsp.binarization.grouped import PAPER, GroupedBinarization
from pbsp.binarization.planes import block_count
from pbsp.errors import FormatError
from pbsp.pruning.pattern import Pattern, format_patterns
from pbsp.storage.bits import CODES, TensorSpec
from pbsp.storage.halves import check_halves, pack_halves, unpack_halves
from pbsp.storage.packing import check_codes, pack_signs, row_bytes, unpack_signs
from pbsp.storage.streams import check_padding, join_bits, row_tiles, split_bits, stream_bytes

MEMBERS = "weight_group"
SCALAR_BITS = "weight_scalar"
SALIENT = "weight_salient"
_MEMBER_WIDTH = 2
_VALUES = (
    (0, 0, 0),
    *((sign, 0, group) for group in range(PAPER.groups) for sign in (1, -1)),
    *((sign, residual_sign, 0) for residual_sign in (-1, 1) for sign in (1, -1)),
)
"""Sign, residual sign and group of every value that a weight can have in a row of a block."""
_TILE_WEIGHTS = 1 << 20  # weights unpacked at once by `check`


@dataclass(frozen=True)
class GroupedForm:
    """What must be known of a linear in layout `paper` to read its tensors.

    Attributes:
        patterns: the one pattern, N:M.
        scale_block: columns that share their scalars.
        salient_parts: runs of rows that have their salient columns in common.

    Raises:
        PatternError: the pattern does not tile the rows.
        FormatError: more than one pattern, or parts that do not divide the rows.
    """

    layout: ClassVar[str] = "paper"
    patterns: tuple[Pattern, ...]
    in_features: int
    out_features: int
    scale_block: int
    salient_parts: int

    def __post_init__(self) -> None:
        if len(self.patterns) != 1 or not isinstance(self.patterns[0], Pattern):
            raise FormatError(
                f"layout {self.layout} has one N:M, not {format_patterns(self.patterns) or 'none'}"
            )
        self.pattern.check(self.in_features)
        if self.out_features % self.salient_parts:
            raise FormatError(
                f"{self.salient_parts} salient_parts do not divide {self.out_features} rows evenly"
            )

    def __str__(self) -> str:
        sizes = f"{self.out_features}x{self.in_features}/{self.scale_block}"
        return f"{self.layout} {self.pattern} {sizes} {self.salient_parts}"

    @property
    def pattern(self) -> Pattern:
        """N:M of the kept weights."""
        return self.patterns[0]

    @property
    def row_kept(self) -> int:
        """Kept weights of a row."""
        return self.in_features // self.pattern.group * self.pattern.kept

    @property
    def label(self) -> str:
        """As plans and reports write it."""
        return format_patterns(self.patterns)

    def specs(self) -> dict[str, TensorSpec]:
        """The stored tensors by the last part of their names, in the order of `PackedGrouped`; no bias."""
        rows, blocks = self.out_features, block_count(self.in_features, self.scale_block)
        members = stream_bytes(self.row_kept, _MEMBER_WIDTH)
        columns = stream_bytes(self.in_features, 1)
        return {
            CODES: TensorSpec(
                (rows, row_bytes(self.pattern, self.in_features)), torch.uint8, "support and signs"
            ),
            MEMBERS: TensorSpec((rows, members), torch.uint8, "groups and residual signs"),
            SCALAR_BITS: TensorSpec((rows, blocks, PAPER.scalars), torch.int16, "scalars"),
            SALIENT: TensorSpec((self.salient_parts, columns), torch.uint8, "salient bitmaps"),
        }

    def packed(self, tensors: Mapping[str, Tensor]) -> "PackedGrouped":
        """The packed matrix whose stored tensors are `tensors`."""
        return PackedGrouped(self, *(tensors[name] for name in self.specs()))

    def nominal_bits(self, read: Callable[[str], Tensor]) -> float:
        """Bits per weight as the paper counts them: (1 + r)·N/M, r the share of salient columns.

        Args:
            read: gives the stored tensor of a name; asked for the bitmaps alone.
        """
        salient = int(split_bits(read(SALIENT), 1, self.in_features).sum())
        return (1 + salient / (self.salient_parts * self.in_features)) * self.pattern.nominal_bits


@dataclass(frozen=True)
class PackedGrouped:
    """The stored form of `GroupedBinarization`.

    Attributes:
        codes: per row, support and signs of each M-group as in a plane.
        members: per row, two bits for each kept weight: its group, or in a salient column whether its
            residual sign is plus.
        scalars: see `storage.halves`.
        salient: per part, one bit for each column.
    """

    form: GroupedForm
    codes: UInt8[Tensor, "out row_bytes"]
    members: UInt8[Tensor, "out member_bytes"]
    scalars: Int16[Tensor, "out blocks scalars"]
    salient: UInt8[Tensor, "parts column_bytes"]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names."""
        return dict(
            zip(self.form.specs(), (self.codes, self.members, self.scalars, self.salient), strict=True)
        )

    def rows(self, low: int, high: int) -> "PackedGrouped":
        """The same matrix cut to rows low…high; of several parts, every row becomes a part of its own."""
        salient = self.salient
        if len(salient) > 1:
            part_rows = self.form.out_features // len(salient)
            salient = salient[torch.arange(low, high, device=salient.device) // part_rows]
        form = replace(self.form, out_features=high - low, salient_parts=len(salient))
        return PackedGrouped(
            form, self.codes[low:high], self.members[low:high], self.scalars[low:high], salient
        )

    def unpack(self) -> GroupedBinarization:
        """The representation, equal in every field to the one that was packed."""
        form = self.form
        signs = unpack_signs(self.codes, form.pattern, form.in_features)
        kept = signs != 0
        stream = split_bits(self.members, _MEMBER_WIDTH, form.row_kept).to(torch.uint8)
        members = torch.zeros_like(signs, dtype=torch.uint8).masked_scatter_(kept, stream)
        salient = split_bits(self.salient, 1, form.in_features).bool()
        twice = _kept_twice(kept, salient)
        residual_signs = (2 * members.view(torch.int8) - 1) * twice.view(torch.int8)
        groups = members * (~twice).view(torch.uint8)
        return GroupedBinarization(
            form.pattern,
            signs,
            residual_signs,
            groups,
            salient,
            unpack_halves(self.scalars),
            form.scale_block,
        )

    @torch.no_grad()
    def decode(self) -> Float[Tensor, "out in"]:
        """All rows in float32: equal to `GroupedBinarization.dense`, bit for bit.

        A row has only eleven values in a block. They are computed once, by `dense` itself, and looked up
        for each weight, which takes less than half the time. Booleans are viewed as bytes because torch
        adds and multiplies mixed types slowly.
        """
        matrix = self.unpack()
        blocks, device = matrix.scalars.shape[1], matrix.signs.device
        rows = len(matrix.signs)
        signs, residual_signs, groups = torch.tensor(_VALUES, device=device).T.repeat(1, blocks)
        values = GroupedBinarization(
            matrix.pattern,
            signs.to(torch.int8).expand(rows, -1),
            residual_signs.to(torch.int8).expand(rows, -1),
            groups.to(torch.uint8).expand(rows, -1),
            (residual_signs != 0)[None],
            matrix.scalars,
            len(_VALUES),
        ).dense()
        kept, minus, twice, plus = (
            condition.view(torch.uint8)
            for condition in (
                matrix.signs != 0, matrix.signs < 0, matrix.residual_signs != 0, matrix.residual_signs > 0,
            )
        )  # fmt: skip
        value = kept * (2 * (matrix.groups + plus + PAPER.groups * twice) + minus + 1)
        block = torch.arange(self.form.in_features, device=device) // self.form.scale_block
        return values.gather(1, value + len(_VALUES) * block)

    def check(self) -> None:
        """Raise FormatError unless every code, group, residual sign, padding bit and scalar has a meaning.

        Shapes and dtypes must have been checked. Run once when a file is read: decoding trusts its input.
        """
        form = self.form
        check_codes(self.codes, form.pattern, form.in_features, CODES)
        check_padding(self.members, _MEMBER_WIDTH * form.row_kept, MEMBERS)
        check_padding(self.salient, form.in_features, SALIENT)
        for low, high in row_tiles(form.out_features, form.in_features, _TILE_WEIGHTS):
            part = self.rows(low, high).unpack()
            if (largest := int(part.groups.max())) >= PAPER.groups:
                raise FormatError(
                    f"{MEMBERS} holds group {largest}; there are groups 0 to {PAPER.groups - 1}"
                )
            if int(part.residual_signs.max()) > 1:
                raise FormatError(f"{MEMBERS} holds 2 or 3 in a salient column; a residual sign is 0 or 1")
        check_halves(self.scalars, SCALAR_BITS)


def fits_layout(matrix: GroupedBinarization) -> bool:
    """Whether the layout can hold it: an N:M pattern, the paper's groups and no column scales."""
    return matrix.pattern is not None and matrix.scheme == PAPER and matrix.column_scales is None


def pack_grouped(matrix: GroupedBinarization) -> PackedGrouped:
    """The stored bytes of `matrix`, which must be packable; `unpack` gives back the same fields.

    Raises:
        PatternError: the pattern does not tile the rows.
    """
    assert fits_layout(matrix), "not of this layout"
    assert matrix.pattern is not None
    rows, columns = matrix.signs.shape
    assert rows % len(matrix.salient) == 0, "the parts are not of equal size"
    form = GroupedForm((matrix.pattern,), columns, rows, matrix.block, len(matrix.salient))
    signs = matrix.signs.contiguous()
    kept = signs != 0
    twice = _kept_twice(kept, matrix.salient)
    assert torch.equal(matrix.residual_signs.abs(), twice.to(torch.int8)), "residual signs are elsewhere"
    once = kept & ~twice
    assert int(matrix.groups.max()) < PAPER.groups, "a group is out of range"
    assert not bool((matrix.groups.bool() & ~once).any()), "a group is given where there is none"
    members = matrix.groups + (matrix.residual_signs > 0)
    return PackedGrouped(
        form,
        pack_signs(signs, matrix.pattern),
        join_bits(members[kept].view(rows, -1), _MEMBER_WIDTH),
        pack_halves(matrix.scalars),
        join_bits(matrix.salient.to(torch.uint8), 1),
    )


def _kept_twice(kept: Bool[Tensor, "out in"], salient: Bool[Tensor, "parts in"]) -> Bool[Tensor, "out in"]:
    """Where a kept weight lies in a salient column of its part."""
    return (kept.view(len(salient), -1, kept.shape[1]) & salient[:, None]).view_as(kept)
