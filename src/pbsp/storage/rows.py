"""Layout `rows`: `QuantizedRows`, whose bytes are stored as they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pbsp.errors import FormatError
from pbsp.quantization.rows import (
    WIDTHS,
    QuantizedRows,
    dequantize_rows,
    group_columns,
    row_bytes,
    row_scales,
    width_for,
)
from pbsp.storage.bits import CODES, TensorSpec, check_rotated, rotated


def has_form(in_features: int, bits: int) -> bool:
    """Whether rows of so many weights can be stored with so many bits."""
    return bits in WIDTHS and width_for(in_features, bits) == bits


@dataclass(frozen=True)
class RowsForm:
    """What must be known of a linear in layout `rows` to read its tensor.

    Attributes:
        bits: of a weight, 4 or 8.
        rotation: see `QuantizedRows`.

    Raises:
        FormatError: rows of so many weights have no form of so many bits.
    """

    layout: ClassVar[str] = "rows"
    bits: int
    in_features: int
    out_features: int
    rotation: int = 1

    def __post_init__(self) -> None:
        if not has_form(self.in_features, self.bits):
            raise FormatError(f"rows of {self.in_features} weights have no {self.bits}-bit form")
        check_rotated(self.in_features, self.rotation)

    def __str__(self) -> str:
        return f"{self.layout} {self.bits} {self.out_features}x{self.in_features}{rotated(self.rotation)}"

    @property
    def label(self) -> str:
        """As plans and reports write it."""
        return f"{self.bits} bit"

    def specs(self) -> dict[str, TensorSpec]:
        """The one stored tensor; no bias."""
        shape = (self.out_features, row_bytes(self.in_features, self.bits))
        return {CODES: TensorSpec(shape, torch.uint8, "integers and scales")}

    def packed(self, tensors: Mapping[str, Tensor]) -> "PackedRows":
        """The packed rows whose stored tensor is in `tensors`."""
        return PackedRows(self, tensors[CODES])

    def nominal_bits(self, read: Callable[[str], Tensor]) -> float:
        """Bits per weight as papers count them, scales left out."""
        return float(self.bits)


@dataclass(frozen=True)
class PackedRows:
    """The stored form of `QuantizedRows`."""

    form: RowsForm
    codes: UInt8[Tensor, "out row_bytes"]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensor by the last part of its name."""
        return {CODES: self.codes}

    def rows(self, low: int, high: int) -> "PackedRows":
        """The same matrix cut to rows low…high, without a copy."""
        return PackedRows(replace(self.form, out_features=high - low), self.codes[low:high])

    def unpack(self) -> QuantizedRows:
        """The representation that was packed."""
        return QuantizedRows(self.codes, self.form.bits, self.form.rotation)

    @torch.no_grad()
    def decode(self) -> Float[Tensor, "out in"]:
        """All rows in float32, in their own basis."""
        return dequantize_rows(self.codes, self.form.bits)

    def check(self) -> None:
        """Raise FormatError unless every scale is a finite number."""
        groups = self.form.in_features // group_columns(self.form.in_features, self.form.bits)
        if not bool(torch.isfinite(row_scales(self.codes.unflatten(1, (groups, -1)))).all()):
            raise FormatError("a scale is not a finite number")


def pack_rows(rows: QuantizedRows) -> PackedRows:
    """The stored form of `rows`; `unpack` gives it back."""
    return PackedRows(RowsForm(rows.bits, rows.columns, len(rows.packed), rows.rotation), rows.packed)
