"""How fast this machine reads memory: the roof of every product that reads each weight once."""

import ctypes
import time

import torch

from pbsp.compiled import check, library, loaded

_BYTES = 1 << 29  # more than any cache holds
_RUNS = 5


def read_bandwidth() -> float:
    """Bytes per second that torch's threads read from memory together: the best of five passes."""
    buffer = torch.ones(_BYTES // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        if loaded():
            total = ctypes.c_uint64()
            check(
                library().pbsp_read(
                    buffer.data_ptr(), buffer.numel(), torch.get_num_threads(), ctypes.byref(total)
                )
            )
        else:
            buffer.sum()
        best = min(best, time.perf_counter() - start)
    return _BYTES / best
