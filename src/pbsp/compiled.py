"""The compiled library: where it lies, which instruction set it uses, and its functions.

Two environment variables choose, both read when first needed: PBSP_KERNEL is one of `KERNELS` or
`reference`, PBSP_ACTIVATIONS one of `ACTIVATIONS`.
"""

import ctypes
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from pbsp.errors import ConfigError

KERNELS = ("avx512", "avx2", "neon", "portable")
"""Instruction sets, the fastest first."""
REFERENCE = "reference"
ACTIVATIONS = {"int16": 2, "float": 4, "int8": 1}
"""Bytes that a number of x becomes; the default first. With the inputs of all its linears rounded to int16,
SmolLM2-135M moves by a KL of 1.5e-7 nats a token; with int8 by 6.4e-3, and computed in bfloat16 by 1.1e-3."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of activations and results, by the library's numbers."""

_ABI = 8
_REFERENCE_ONLY = ("paper", "low-rank")
_PLACES = (
    Path(__file__).parent / "kernels" / "pbsp_cpu.so",  # installed
    Path(__file__).parent
    / "kernels"
    / "cpu"
    / "pbsp_cpu.so",  # built in the source tree, by an editable install
)
_MAX_PLANES = 4


class MatrixStruct(ctypes.Structure):
    """`PbspMatrix` of pbsp_cpu.h."""

    _fields_ = (
        ("layout", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("scale_block", ctypes.c_int64),
        ("planes", ctypes.c_int32),
        ("patterns", ctypes.c_int32 * (2 * _MAX_PLANES)),
        ("rotation", ctypes.c_int32),
        ("shared_scales", ctypes.c_int32),
        ("vectors", ctypes.c_void_p * _MAX_PLANES),
    )


@lru_cache(maxsize=1)
def kernel_name() -> str:
    """The path that products of packed planes take on the CPU: one of `KERNELS`, or `reference`.

    Raises:
        ConfigError: PBSP_KERNEL is unknown, or this machine or installation lacks it.
    """
    asked = os.environ.get("PBSP_KERNEL", "")
    if asked == REFERENCE:
        return REFERENCE
    if asked and asked not in KERNELS:
        raise ConfigError(f"PBSP_KERNEL is {asked!r}; choose one of {', '.join((*KERNELS, REFERENCE))}")
    opened = _load()
    if opened is None:
        if asked:
            raise ConfigError(
                f"PBSP_KERNEL is {asked}, but pbsp was installed without its compiled kernels; install it "
                "again with a C++ compiler, or unset PBSP_KERNEL"
            )
        warnings.warn(
            "pbsp was installed without its compiled kernels (was there a C++ compiler?): packed linears "
            "compute with torch, many times slower",
            stacklevel=2,
        )
        return REFERENCE
    supported = [name for name in KERNELS if opened.pbsp_supports(name.encode())]
    if asked and asked not in supported:
        raise ConfigError(
            f"PBSP_KERNEL is {asked}, which this machine cannot run; it runs {', '.join(supported)}"
        )
    return asked or supported[0]


@lru_cache(maxsize=1)
def activations() -> str:
    """How exactly activations enter products: one of `ACTIVATIONS`.

    Raises:
        ConfigError: PBSP_ACTIVATIONS is unknown.
    """
    asked = os.environ.get("PBSP_ACTIVATIONS") or next(iter(ACTIVATIONS))
    if asked not in ACTIVATIONS:
        raise ConfigError(f"PBSP_ACTIVATIONS is {asked!r}; choose one of {', '.join(ACTIVATIONS)}")
    return asked


def kernel_of(layout: str) -> str:
    """The path of products on the CPU with matrices of that layout; rivals' have no compiled one."""
    return REFERENCE if layout in _REFERENCE_ONLY else kernel_name()


def loaded() -> bool:
    """Whether pbsp was installed with its compiled kernels."""
    return _load() is not None


def library() -> ctypes.CDLL:
    """The loaded library; only to be called where `kernel_name` is not `reference`."""
    opened = _load()
    assert opened is not None, "kernel_name told that there is one"
    return opened


def check(status: int) -> None:
    """Raise MemoryError if a function of the library says that there was not enough."""
    if status:
        raise MemoryError("not enough memory for the buffers of a packed linear")


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    for path in _PLACES:
        if path.is_file():
            opened = ctypes.CDLL(str(path))
            if opened.pbsp_abi() == _ABI:
                _declare(opened)
                _use_torch_threads(opened)
                return opened
    return None


def _declare(opened: ctypes.CDLL) -> None:
    pointer, number, matrix = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(MatrixStruct)
    text, small = ctypes.c_char_p, ctypes.c_int
    opened.pbsp_row_bytes.restype = number
    for name, arguments in {
        "pbsp_supports": [text],
        "pbsp_use_team": [pointer],
        "pbsp_row_bytes": [matrix],
        "pbsp_from_codes": [matrix, pointer, pointer, small],
        "pbsp_to_codes": [matrix, pointer, small],
        "pbsp_multiply": [text, matrix, pointer, pointer, number, small, pointer, small, small],
        "pbsp_decode": [text, matrix, number, number, pointer, small, small],
        "pbsp_multiply_rows": [text, small, pointer, number, number, pointer, number, pointer, small],
        "pbsp_best_codes": [text, small, small, pointer, pointer, pointer, pointer, number, small],
        "pbsp_best_vectors": [text, pointer, number, pointer, pointer, pointer, pointer, number, small],
        "pbsp_nearest_points": [text, pointer, pointer, number, small],
        "pbsp_read": [pointer, number, small, ctypes.POINTER(ctypes.c_uint64)],
    }.items():
        getattr(opened, name).argtypes = arguments


def _use_torch_threads(opened: ctypes.CDLL) -> None:
    """Let the kernels run on the threads of torch's own OpenMP library, see parallel.hpp.

    Where it is not found (it has another name on macOS) they start threads of their own.
    """
    if sys.platform != "linux":
        return
    package = Path(torch.__file__).parent
    for path in (*package.glob("lib/libgomp*"), *package.parent.glob("torch.libs/libgomp*")):
        try:
            openmp = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:  # there, but another one is loaded
            continue
        opened.pbsp_use_team(ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p))
        return
