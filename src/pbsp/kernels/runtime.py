"""Packed planes as the compiled kernels want them; cpu/planes.hpp spells the layout out.

It holds what the codes hold, in 1 + N/M bits per weight and plane instead of log₂ C(M, N)/M + N/M, and is
turned back into the very same codes.
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from pbsp.compiled import DTYPES, MatrixStruct, check, kernel_name, library
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern, PlanePattern
from pbsp.storage.planes import PackedPlanes, PlanesForm

MatrixArguments = tuple[Tensor, Tensor, Tensor, list[int], int, int, int]
"""What operators know: layout, scales, offsets, N and M by plane (of a lattice: 0 and the bits of its codes),
columns, scale block, rotation."""


@dataclass(frozen=True)
class RuntimePlanes:
    """Packed planes in the runtime layout, on the CPU; scales stay as they are stored.

    Attributes:
        layout: per row, plane by plane, the signs of kept weights, then the bitmap of what is kept.
    """

    form: PlanesForm
    layout: UInt8[Tensor, "out layout_bytes"]
    scales: UInt8[Tensor, "out plane_blocks"]
    offsets: Int8[Tensor, "planes"]

    @classmethod
    def of(cls, packed: PackedPlanes) -> "RuntimePlanes":
        """The runtime layout of valid codes on the CPU, made by all of torch's threads."""
        shell = cls(packed.form, packed.codes, packed.scales, packed.offsets)
        row_bytes = library().pbsp_row_bytes(ctypes.byref(shell.struct()))
        layout = torch.empty(packed.form.out_features, row_bytes, dtype=torch.uint8)
        codes = packed.codes.contiguous()
        check(
            library().pbsp_from_codes(
                ctypes.byref(shell.struct()), codes.data_ptr(), layout.data_ptr(), torch.get_num_threads()
            )
        )
        return cls(packed.form, layout, packed.scales, packed.offsets)

    def packed(self) -> PackedPlanes:
        """The stored form again: the codes that this was made of, byte for byte."""
        shape = self.form.out_features, sum(self.form.plane_bytes)
        codes = torch.empty(shape, dtype=torch.uint8)
        struct = self.struct()
        check(library().pbsp_to_codes(ctypes.byref(struct), codes.data_ptr(), torch.get_num_threads()))
        return PackedPlanes(self.form, codes, self.scales, self.offsets)

    def rows(self, low: int, high: int) -> "RuntimePlanes":
        """The same matrix cut to rows low…high, without a copy."""
        form = replace(self.form, out_features=high - low)
        return RuntimePlanes(form, self.layout[low:high], self.scales[low:high], self.offsets)

    @torch.no_grad()
    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """All rows, summed in float32 in plane order and rounded once: what the codes decode to."""
        if dtype not in DTYPES:
            return self.decode().to(dtype)
        dense = torch.empty(self.form.out_features, self.form.in_features, dtype=dtype)
        check(
            library().pbsp_decode(
                kernel_name().encode(),
                ctypes.byref(self.struct()),
                0,
                self.form.out_features,
                dense.data_ptr(),
                DTYPES[dtype],
                torch.get_num_threads(),
            )
        )
        return dense

    @property
    def arguments(self) -> MatrixArguments:
        """The same for an operator."""
        return self.layout, self.scales, self.offsets, *form_numbers(self.form)

    def struct(self) -> MatrixStruct:
        """The same for the library; this object must outlive it."""
        return matrix_struct(*self.arguments)


def form_numbers(form: PlanesForm) -> tuple[list[int], int, int, int]:
    """The last four of `MatrixArguments`."""
    patterns = [number for pattern in form.patterns for number in _numbers(pattern)]
    return patterns, form.in_features, form.scale_block, form.rotation


def patterns_of(numbers: list[int]) -> tuple[PlanePattern, ...]:
    """The planes that the first of `form_numbers` stand for."""
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return tuple(Pattern(kept, group) if kept else Lattice(group) for kept, group in pairs)


def _numbers(pattern: PlanePattern) -> tuple[int, int]:
    return (0, pattern.bits) if isinstance(pattern, Lattice) else (pattern.kept, pattern.group)


def matrix_struct(
    layout: Tensor,
    scales: Tensor,
    offsets: Tensor,
    patterns: list[int],
    columns: int,
    scale_block: int,
    rotation: int,
) -> MatrixStruct:
    """Pointers and sizes for the library."""
    assert layout.is_contiguous(), "rows of the runtime layout follow each other"
    assert scales.is_contiguous(), "so do rows of scales"
    return MatrixStruct(
        layout.data_ptr(),
        scales.data_ptr(),
        offsets.data_ptr(),
        layout.shape[0],
        columns,
        scale_block,
        len(patterns) // 2,
        tuple(patterns),
        rotation,
        len(offsets) < len(patterns) // 2,
        tuple(
            Lattice(bits).codes().data_ptr() if kept == 0 else None  # their cache keeps them in memory
            for kept, bits in zip(patterns[::2], patterns[1::2], strict=True)
        ),
    )
