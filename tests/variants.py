"""Every method with the options that change what kind of result it gives, and a problem to give it."""

import torch

from pbsp.methods.table import METHODS

VARIANTS = [
    *((name, {}) for name in METHODS),
    *(("arb", {"variant": name, "bitmap": split}) for name in ("arb", "x", "rc") for split in (True, False)),
    ("stbllm", {"zeros": "released"}),
    ("prune-then-binarize", {"pruner": "wanda"}),
    ("prune-then-binarize", {"pruner": "magnitude"}),
    ("prune-then-binarize", {"pruner": "si"}),
]  # fmt: skip


def layer_problem(rows=12, columns=48, *, tokens=300, seed=0, dtype=torch.float32):
    """A weight, and the moment of inputs that are correlated and of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    mix *= torch.rand(columns, generator=generator, dtype=dtype)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, inputs.T @ inputs / tokens
