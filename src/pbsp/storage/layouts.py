"""The layouts that a linear can be stored in; nothing above this file asks which one a linear has."""

from pbsp.binarization.grouped import GroupedBinarization
from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.planes import Planes
from pbsp.quantization.integers import IntegerGroups
from pbsp.quantization.rows import QuantizedRows
from pbsp.storage.grouped import SALIENT, GroupedForm, PackedGrouped, fits_layout, pack_grouped
from pbsp.storage.low_rank import COLUMN_CODES, LowRankForm, PackedLowRank, pack_low_rank
from pbsp.storage.planes import OFFSETS, PackedPlanes, PlanesForm, pack_planes
from pbsp.storage.rows import PackedRows, RowsForm, pack_rows

Representation = Planes | GroupedBinarization | QuantizedRows | IntegerGroups | LowRankBinary
Form = PlanesForm | GroupedForm | RowsForm | LowRankForm
Packed = PackedPlanes | PackedGrouped | PackedRows | PackedLowRank

FORMS: dict[str, type[Form]] = {
    form.layout: form for form in (PlanesForm, GroupedForm, RowsForm, LowRankForm)
}
MARKERS = (OFFSETS, SALIENT, COLUMN_CODES)
"""Names of tensors that only packed linears have; layout `rows` has none, its one tensor is `weight`."""


def is_packable(representation: Representation) -> bool:
    """Whether there is a layout for it: most rivals have none and are only counted, see `counting`."""
    if isinstance(representation, GroupedBinarization):
        return fits_layout(representation)
    return isinstance(representation, Planes | QuantizedRows | LowRankBinary)


def pack(representation: Representation) -> Packed:
    """The stored bytes of a packable `representation`; `unpack` gives it back.

    Raises:
        PatternError: a pattern does not tile the rows.
    """
    if isinstance(representation, Planes):
        return pack_planes(representation)
    if isinstance(representation, QuantizedRows):
        return pack_rows(representation)
    if isinstance(representation, LowRankBinary):
        return pack_low_rank(representation)
    assert isinstance(representation, GroupedBinarization), "not packable"
    return pack_grouped(representation)


def join(parts: list[Representation]) -> Representation:
    """The matrix whose rows are those of `parts`, of one layout, one below the other."""
    return type(parts[0]).join(parts)  # pyright: ignore[reportArgumentType]
