"""Every method with the options that change what kind of result it gives, and a problem to give it."""

import torch

from pbsp.methods.table import METHODS, Method, build_method, option_types

VARIANTS = [
    *((name, {}) for name in METHODS if name != "nanoquant"),
    # Scales are most of what the small problems take, and a tenth of the rounds is enough for them.
    *(("nanoquant", {"bits": 6.0, "iterations": 40, "refits": refits}) for refits in (0, 2)),
    *(("arb", {"variant": name, "bitmap": split}) for name in ("arb", "x", "rc") for split in (True, False)),
    ("stbllm", {"zeros": "released"}),
    ("prune-then-binarize", {"pruner": "wanda"}),
    ("prune-then-binarize", {"pruner": "magnitude"}),
    ("prune-then-binarize", {"pruner": "si"}),
]  # fmt: skip


def build_variant(name: str, options: dict, block: int) -> Method:
    """The method, with blocks of that size if it has blocks; integers in 8 bit, as 4 need wider rows."""
    if name == "integers":
        return build_method(name, None, {"bits": 8})
    blocks = {"block": block} if "block" in option_types(name) else {}
    return build_method(name, None, {**blocks, **options})


def layer_problem(rows=12, columns=48, *, tokens=300, seed=0, dtype=torch.float32):
    """A weight, and the moment of inputs that are correlated and of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    mix *= torch.rand(columns, generator=generator, dtype=dtype)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, inputs.T @ inputs / tokens


def code_problem(rows, group, seed=0):
    """Correlations, metric and scales that a group's codes are searched for."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(group, group, generator=generator)
    return (
        torch.randn(group, rows, generator=generator),
        basis @ basis.T / group,
        torch.rand(rows, generator=generator),
    )
