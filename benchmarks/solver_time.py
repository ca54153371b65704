"""Seconds of the paper's method on one random layer, by rounds of updates, N:M and width; one thread.

The points behind the formula in docs/method.md, section "Cost".
"""

import time

import torch

from pbsp.methods.pbsp import Pbsp
from pbsp.pruning.pattern import Pattern

POINTS = [
    *((1024, 1024, 4, updates) for updates in (1, 2, 4, 8)),
    *((1024, 1024, kept, 2) for kept in (5, 6, 7)),
    *((1024, width, 4, 2) for width in (2048, 4096)),
    (4096, 4096, 4, 2),
]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for rows, columns, kept, updates in POINTS:
        weight = torch.randn(rows, columns)
        inputs = torch.randn(2 * columns, columns) * torch.rand(columns)
        moment = inputs.T @ inputs / len(inputs)
        start = time.perf_counter()
        Pbsp(Pattern(kept, 8), updates=updates).compress(weight, moment)
        seconds = time.perf_counter() - start
        spent = f"{seconds:.2f} s, {seconds / weight.numel() * 1e6:.2f} µs a weight"
        print(f"{rows}×{columns}  {kept}:8  updates={updates}  {spent}", flush=True)


if __name__ == "__main__":
    main()
