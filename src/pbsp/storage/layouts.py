"""The layouts that a linear can be stored in; nothing above this file asks which one a linear has."""

from pbsp.binarization.grouped import GroupedBinarization
from pbsp.binarization.planes import Planes
from pbsp.storage.grouped import SALIENT, GroupedForm, PackedGrouped, pack_grouped
from pbsp.storage.planes import OFFSETS, PackedPlanes, PlanesForm, pack_planes

Representation = Planes | GroupedBinarization
Form = PlanesForm | GroupedForm
Packed = PackedPlanes | PackedGrouped

FORMS: dict[str, type[PlanesForm] | type[GroupedForm]] = {
    form.layout: form for form in (PlanesForm, GroupedForm)
}
MARKERS = (OFFSETS, SALIENT)
"""Of each layout, the name of a tensor that only its packed linears have."""


def pack(representation: Representation) -> Packed:
    """The stored bytes of `representation`; `unpack` gives it back.

    Raises:
        PatternError: a pattern does not tile the rows.
    """
    if isinstance(representation, Planes):
        return pack_planes(representation)
    return pack_grouped(representation)


def join(parts: list[Representation]) -> Representation:
    """The matrix whose rows are those of `parts`, of one layout, one below the other."""
    planes = [part for part in parts if isinstance(part, Planes)]
    if planes:
        return Planes.join(planes)
    return GroupedBinarization.join([part for part in parts if isinstance(part, GroupedBinarization)])
