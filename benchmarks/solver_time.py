"""Seconds that methods take for one random layer, by their settings and the layer's width.

Points behind the formula in docs/method.md, section "Cost" (one thread), and the table in docs/results.md,
section "On a GPU" (--device cuda).
"""

import argparse
import time

import torch

from pbsp.config import Config

POINTS = [
    *((f"pbsp 4:8 updates={updates}", 1024, 1024) for updates in (1, 2, 4, 8)),
    *((f"pbsp {kept}:8 updates=2", 1024, 1024) for kept in (5, 6, 7)),
    *(("pbsp 4:8 updates=2", 1024, width) for width in (2048, 4096)),
    *(("pbsp 4:8 updates=2", width, width) for width in (576, 4096)),
    *((f"planes {planes}", width, width) for planes in ("2:8", "3:8+3:8+1:8") for width in (576, 4096)),
    ("gptq bits=3", 4096, 4096),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="points that begin so, as 'planes 2:8'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for row, rows, columns in POINTS:
        if row.startswith(options.only):
            seconds = timed(row, rows, columns, torch.device(options.device))
            spent = f"{seconds:.2f} s, {seconds / (rows * columns) * 1e6:.2f} µs a weight"
            print(f"{rows}×{columns}  {row}  {spent}", flush=True)


@torch.no_grad()
def timed(row: str, rows: int, columns: int, device: torch.device) -> float:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, device=device)
    inputs = torch.randn(2 * columns, columns, device=device) * torch.rand(columns, device=device)
    moment = inputs.T @ inputs / len(inputs)
    method = Config.parse(row).build()
    if device.type == "cuda":  # load its libraries
        method.compress(weight[:8, :128], moment[:128, :128])
        torch.cuda.synchronize()
    start = time.perf_counter()
    method.compress(weight, moment)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
