"""Products of one matrix with few and many rows of activations, beside torch's dense ones.

Every matrix is there so many times that no cache holds them all, and every row names what it was measured
against in the same run: torch in float32 and bfloat16, and the speed at which memory gives the bytes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pbsp.binarization.planes import block_count
from pbsp.compiled import activations, kernel_name
from pbsp.kernels.bandwidth import read_bandwidth
from pbsp.kernels.product import planes_linear
from pbsp.kernels.runtime import RuntimePlanes
from pbsp.pruning.pattern import PlanePattern, parse_patterns
from pbsp.storage.planes import PackedPlanes, PlanesForm
from pbsp.storage.streams import join_bits

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (192, 576), (1536, 576), (576, 1536))
SMALL = 1 << 20  # weights: a real model rotates over its layers of this size too, but through its caches


def random_codes(pattern: PlanePattern, rows: int, columns: int) -> Tensor:
    codes = torch.randint(pattern.code_count, (rows, columns // pattern.group))
    return join_bits(codes, pattern.code_bits)


def random_planes(text: str, rows: int, columns: int, scale_block: int) -> RuntimePlanes:
    patterns = parse_patterns(text)
    form = PlanesForm(patterns, columns, rows, scale_block)
    codes = torch.cat([random_codes(pattern, rows, columns) for pattern in patterns], 1)
    blocks = len(patterns) * block_count(columns, scale_block)
    scales = torch.randint(32, 256, (rows, blocks), dtype=torch.uint8)
    offsets = torch.full((len(patterns),), -18, dtype=torch.int8)
    return RuntimePlanes.of(PackedPlanes(form, codes, scales, offsets))


def copies(tensors: tuple[Tensor, ...], rotate_bytes: int) -> list[tuple[Tensor, ...]]:
    count = max(1, -(-rotate_bytes // sum(tensor.nbytes for tensor in tensors)))
    return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1))]


def seconds(product: Callable[..., Tensor], matrices: list[tuple[Tensor, ...]], rounds: int) -> float:
    """Median time of a product while the matrices take turns."""
    for matrix in matrices[:2]:
        product(*matrix)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for matrix in matrices:
            product(*matrix)
        times.append((time.perf_counter() - start) / len(matrices))
    return statistics.median(times)


@torch.no_grad()
def measure(options: argparse.Namespace, rows: int, columns: int, x_rows: int, bandwidth: float) -> str:
    small = rows * columns <= SMALL
    rotate = (options.rotate_mb << 20) >> (4 if small else 0)
    rounds = options.rounds if x_rows == 1 or small else 1
    if x_rows > 32:
        rotate = 0  # compute-bound: one matrix is enough
    planes = random_planes(options.pattern, rows, columns, options.scale_block)
    layout, scales = planes.arguments[:2]
    rest = planes.arguments[2:]
    x = torch.randn(x_rows, columns)
    packed = copies((layout, scales), rotate)
    ours = seconds(lambda a, b: planes_linear(x, (a, b, *rest)), packed, rounds)
    read = layout.nbytes + scales.nbytes
    del packed
    cells = [f"{rows}×{columns}", f"{x_rows} rows", f"{ours * 1e6:9.1f} µs"]
    for dtype in (torch.float32, torch.bfloat16):
        dense = copies((torch.randn(rows, columns).to(dtype),), rotate)
        theirs = seconds(partial(torch.nn.functional.linear, x.to(dtype)), dense, rounds)
        cells.append(f"{theirs / ours:6.2f}× {str(dtype).removeprefix('torch.')}")
        del dense
    cells.append(f"{rows * columns * x_rows / ours / 1e9:6.1f} G weights/s")
    if x_rows == 1:
        cells.append(f"{read / ours / bandwidth:6.1%} of memory's speed")
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pattern", default="4:8")
    parser.add_argument("--scale-block", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 512], help="of activations")
    parser.add_argument("--shapes", nargs="+", help="as 4096x4096; a model's usual ones if not given")
    parser.add_argument(
        "--rotate-mb", type=int, default=512, help="weights that take turns; 1/16 for small ones"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes] if options.shapes else SHAPES
    bandwidth = read_bandwidth()
    print(
        f"kernel {kernel_name()}, activations {activations()}, pattern {options.pattern}, scales of "
        f"{options.scale_block}, {torch.get_num_threads()} threads, memory reads {bandwidth / 1e9:.1f} GB/s; "
        "× = times as fast as torch's dense product",
        flush=True,
    )
    for rows, columns in shapes:
        for x_rows in options.rows:
            print(measure(options, rows, columns, x_rows, bandwidth), flush=True)


if __name__ == "__main__":
    main()
