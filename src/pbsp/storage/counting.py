"""What a matrix would take in a file: the numbers to rebuild it from, where no layout packs it."""

import torch
from jaxtyping import Bool
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization
from pbsp.quantization.integers import IntegerGroups
from pbsp.storage.bits import Stream, stored_bits, streams_bits
from pbsp.storage.layouts import Representation, is_packable, pack
from pbsp.storage.packing import support_ranks


def count_bits(representation: Representation) -> int:
    """Bits of the packed tensors where a layout can hold it, else of its streams end to end."""
    if is_packable(representation):
        return stored_bits(pack(representation).tensors().values())
    return streams_bits(streams(representation))


def streams(representation: Representation) -> list[Stream]:
    """All numbers that differ between matrices of one shape and one method's settings.

    They are enough to rebuild `dense`; the tests do.
    """
    if isinstance(representation, IntegerGroups):
        return _integer_streams(representation)
    assert isinstance(representation, GroupedBinarization), "all others are packed"
    return _grouped_streams(representation)


def _integer_streams(matrix: IntegerGroups) -> list[Stream]:
    return [
        Stream("codes", matrix.codes.flatten(), matrix.width),
        _halves("scales", matrix.scales),
        Stream("zeros", matrix.zeros.flatten(), matrix.width),
    ]


def _grouped_streams(matrix: GroupedBinarization) -> list[Stream]:
    kept = matrix.signs != 0
    twice = matrix.residual_signs != 0
    found = [*_mask_streams(matrix, kept), _bits("signs", matrix.signs[kept] > 0)]
    scheme = matrix.scheme
    for kind, groups, members in (
        ("groups", scheme.groups, kept & ~twice),
        ("salient groups", scheme.salient_groups, kept & twice),
    ):
        if groups > 1:
            found.append(Stream(kind, matrix.groups[members], (groups - 1).bit_length()))
    if scheme.salient_groups:
        found.append(_bits("residual signs", matrix.residual_signs[twice] > 0))
        found.append(_bits("salient columns", matrix.salient.flatten()))
    found.append(_halves("scalars", matrix.scalars))
    if matrix.column_scales is not None:
        found.append(_halves("column scales", matrix.column_scales[_used_scales(matrix)]))
    return found


def _used_scales(matrix: GroupedBinarization) -> Bool[Tensor, "parts scalars in"]:
    """Which column scales can be read: a column has only those of its kind, salient or not."""
    salient = [level.salient for level in matrix.scheme.levels() for _ in level.positions]
    kinds = torch.tensor(salient, device=matrix.salient.device)
    return matrix.salient[:, None] == kinds[:, None]


def _mask_streams(matrix: GroupedBinarization, kept: Tensor) -> list[Stream]:
    """Where weights are kept: supports of an N:M, else whole columns if they suffice, else a bitmap."""
    if matrix.pattern is not None:
        width = (matrix.pattern.supports - 1).bit_length()
        ranks = support_ranks(matrix.signs, matrix.pattern).flatten()
        return [Stream("supports", ranks, width)] if width else []
    if bool(kept.all()):
        return []
    if bool((kept == kept[:1]).all()):
        return [_bits("kept columns", kept[0])]
    return [_bits("kept weights", kept.flatten())]


def _bits(kind: str, flags: Tensor) -> Stream:
    return Stream(kind, flags.to(torch.uint8), 1)


def _halves(kind: str, values: Tensor) -> Stream:
    """The bit patterns of float16 values."""
    return Stream(kind, values.half().flatten().view(torch.int16).int() & 0xFFFF, 16)
