"""Layout `low-rank`: `LowRankBinary` as bytes, both directions and bit-exact; see docs/format.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int8, Int16, UInt8
from torch import Tensor

from pbsp.binarization.low_rank import LowRankBinary
from pbsp.storage.bits import CODES, TensorSpec
from pbsp.storage.halves import check_halves, pack_halves, unpack_halves
from pbsp.storage.streams import check_padding, join_bits, split_bits, stream_bytes

COLUMN_CODES = "weight_column"
ROW_SCALES = "weight_row_scale"
COLUMN_SCALES = "weight_column_scale"


@dataclass(frozen=True)
class LowRankForm:
    """What must be known of a linear in layout `low-rank` to read its tensors.

    Attributes:
        rank: columns of either factor.
    """

    layout: ClassVar[str] = "low-rank"
    rank: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.layout} {self.rank} {self.out_features}x{self.in_features}"

    @property
    def label(self) -> str:
        """As plans and reports write it."""
        return f"rank {self.rank}"

    def specs(self) -> dict[str, TensorSpec]:
        """The stored tensors by the last part of their names, in the order of `PackedLowRank`; no bias."""
        rows, columns, signs = self.out_features, self.in_features, stream_bytes(self.rank, 1)
        return {
            CODES: TensorSpec((rows, signs), torch.uint8, "signs of rows"),
            COLUMN_CODES: TensorSpec((columns, signs), torch.uint8, "signs of columns"),
            ROW_SCALES: TensorSpec((rows,), torch.int16, "scales of rows"),
            COLUMN_SCALES: TensorSpec((columns,), torch.int16, "scales of columns"),
        }

    def packed(self, tensors: Mapping[str, Tensor]) -> "PackedLowRank":
        """The packed matrix whose stored tensors are `tensors`."""
        return PackedLowRank(self, *(tensors[name] for name in self.specs()))

    def nominal_bits(self, read: Callable[[str], Tensor]) -> float:
        """Signs per weight, scales left out."""
        rows, columns = self.out_features, self.in_features
        return self.rank * (rows + columns) / (rows * columns)


@dataclass(frozen=True)
class PackedLowRank:
    """The stored form of `LowRankBinary`.

    Attributes:
        codes: U, a bit a sign, 1 = plus.
        column_codes: V, likewise.
        row_scales: see `storage.halves`.
        column_scales: likewise.
    """

    form: LowRankForm
    codes: UInt8[Tensor, "out sign_bytes"]
    column_codes: UInt8[Tensor, "in sign_bytes"]
    row_scales: Int16[Tensor, "out"]
    column_scales: Int16[Tensor, "in"]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names."""
        stored = self.codes, self.column_codes, self.row_scales, self.column_scales
        return dict(zip(self.form.specs(), stored, strict=True))

    def rows(self, low: int, high: int) -> "PackedLowRank":
        """The same matrix cut to rows low…high, without a copy."""
        form = replace(self.form, out_features=high - low)
        return PackedLowRank(
            form, self.codes[low:high], self.column_codes, self.row_scales[low:high], self.column_scales
        )

    def unpack(self) -> LowRankBinary:
        """The representation, equal in every field to the one that was packed."""
        rank = self.form.rank
        return LowRankBinary(
            row_signs=_signs(self.codes, rank),
            column_signs=_signs(self.column_codes, rank),
            row_scales=unpack_halves(self.row_scales),
            column_scales=unpack_halves(self.column_scales),
        )

    @torch.no_grad()
    def decode(self) -> Float[Tensor, "out in"]:
        """All rows in float32: equal to `LowRankBinary.dense`, bit for bit."""
        return self.unpack().dense()

    def check(self) -> None:
        """Raise FormatError unless padding is zero and every scale finite."""
        check_padding(self.codes, self.form.rank, CODES)
        check_padding(self.column_codes, self.form.rank, COLUMN_CODES)
        check_halves(self.row_scales, ROW_SCALES)
        check_halves(self.column_scales, COLUMN_SCALES)


def pack_low_rank(matrix: LowRankBinary) -> PackedLowRank:
    """The stored form of `matrix`; `unpack` gives it back."""
    rows, rank = matrix.row_signs.shape
    return PackedLowRank(
        LowRankForm(rank, len(matrix.column_signs), rows),
        join_bits((matrix.row_signs > 0).to(torch.uint8), 1),
        join_bits((matrix.column_signs > 0).to(torch.uint8), 1),
        pack_halves(matrix.row_scales),
        pack_halves(matrix.column_scales),
    )


def _signs(stream: UInt8[Tensor, "side sign_bytes"], rank: int) -> Int8[Tensor, "side rank"]:
    return (2 * split_bits(stream, 1, rank) - 1).to(torch.int8)
