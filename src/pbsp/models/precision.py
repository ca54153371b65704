"""The values of a model's weights: whether all are finite, and which 16-bit type can hold them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.errors import ConfigError
from pbsp.models.shards import shards_of
from pbsp.models.survey import check_tensor, largest_value, once_each, tensors_digest


def check_finite(model: PreTrainedModel) -> None:
    """Raise ModelError, naming the layer, if a weight is NaN or infinite."""
    if shards := shards_of(model):
        _ = shards.survey
        return
    for name, parameter in model.named_parameters():
        check_tensor(name, parameter)


def storage_dtype(model: PreTrainedModel, requested: str) -> torch.dtype:
    """The 16-bit type for what stays uncompressed.

    "auto" keeps a 16-bit model's own type: float16 cannot replace bfloat16, whose activations may
    be out of its range. A float32 model becomes float16 if its weights are in range.

    Raises:
        ConfigError: float16 is requested and a weight is out of its range.
    """
    if requested == "bfloat16":
        return torch.bfloat16
    if requested == "auto" and model.dtype in (torch.float16, torch.bfloat16):
        return model.dtype
    shards = shards_of(model)
    largest = shards.survey.largest if shards else max(map(largest_value, _floats(model)))
    if largest <= torch.finfo(torch.float16).max:
        return torch.float16
    if requested == "float16":
        raise ConfigError(f"dtype float16 cannot hold a weight of {largest:.3g}; choose bfloat16")
    return torch.bfloat16


def cast_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what `save_pretrained` writes; other buffers stay, as rotary frequencies need their float32."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` writes, by its first name; a tensor with two names comes once."""
    return once_each(model.state_dict(keep_vars=True).items())


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the names and bytes of all stored tensors."""
    shards = shards_of(model)
    return shards.survey.digest if shards else tensors_digest(stored_tensors(model))


def _floats(model: PreTrainedModel) -> Iterator[Tensor]:
    return (parameter for parameter in model.parameters() if parameter.is_floating_point())
