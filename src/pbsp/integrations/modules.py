"""Packed linears in a model: put in a linear's place, described, and turned back into plain ones."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pbsp.errors import FormatError
from pbsp.packed_linear import PackedLinear
from pbsp.storage.checkpoint import LayerEntry, packed_digest
from pbsp.storage.layouts import Form


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has its submodule `name`.

    A packed linear takes over the training mode, and whether a `Conv1D` stood there.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    replaced = model.get_submodule(name)
    if isinstance(module, PackedLinear):
        module.conv1d = isinstance(replaced, Conv1D) or getattr(replaced, "conv1d", False)
    module.train(replaced.training)
    setattr(parent, name.rpartition(".")[2], module)


def dense_module(module: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """The `nn.Linear`, or `Conv1D`, that computes what the packed linear does."""
    dense = module.dense(dtype)
    with torch.device("meta"):
        if module.conv1d:
            linear = Conv1D(module.out_features, module.in_features)
        else:
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(dense.T.contiguous() if module.conv1d else dense)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(dtype))
    return linear


def packed_entry(module: PackedLinear) -> LayerEntry:
    """What config.json says about a packed linear."""
    return LayerEntry(module.form, module.bias is not None, packed_digest(module.packed))


def check_place(model: PreTrainedModel, name: str, entry: LayerEntry) -> None:
    """Raise FormatError unless the model has a linear `name` of the entry's shape."""
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear | Conv1D):
        raise FormatError(f"layer {name}: {type(model).__name__} has no linear of that name")
    tied = model.all_tied_weights_keys
    if f"{name}.weight" in {*tied, *tied.values()}:
        raise FormatError(f"layer {name}: its weight is tied to another, so it cannot be packed")
    out_features, in_features = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
    found = (out_features, in_features, module.bias is not None)
    expected = (entry.form.out_features, entry.form.in_features, entry.bias)
    if found != expected:
        raise FormatError(
            f"layer {name}: (out_features, in_features, bias) are {found} in {type(model).__name__} and "
            f"{expected} in quantization_config"
        )


def empty_linear(replaced: nn.Module, form: Form) -> PackedLinear:
    """A packed linear without values, for the place of `replaced`."""
    bias_dtype = replaced.bias.dtype if isinstance(replaced.bias, torch.Tensor) else None
    return PackedLinear(form, bias_dtype=bias_dtype, device="meta")
