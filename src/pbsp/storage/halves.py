"""float16 numbers as integers of their bit patterns: a model cast to another dtype would round floats."""

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from pbsp.errors import FormatError


def pack_halves(values: Float[Tensor, "*shape"]) -> Int16[Tensor, "*shape"]:
    """The bit patterns of values that float16 holds exactly."""
    halves = values.to(torch.float16).contiguous()
    assert torch.equal(halves.float(), values), "values were not rounded to float16"
    assert bool(torch.isfinite(halves).all()), "a value is infinite"
    return halves.view(torch.int16)


def unpack_halves(patterns: Int16[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values in float32."""
    return patterns.view(torch.float16).float()


def check_halves(patterns: Int16[Tensor, "*shape"], name: str) -> None:
    """Raise FormatError, which names the tensor, unless all are finite."""
    if not bool(torch.isfinite(patterns.view(torch.float16)).all()):
        raise FormatError(f"{name} holds a NaN or an infinity")
