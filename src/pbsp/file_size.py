"""How large a plan makes a model's file, and the best plan for a file of a given size."""

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.allocation.entry import entry_bits, entry_form
from pbsp.allocation.measured import Costs
from pbsp.allocation.plan import Plan
from pbsp.config import Config
from pbsp.embedding_rounding import head_moment, round_head
from pbsp.errors import ConfigError
from pbsp.evaluation.perplexity import mean_loss
from pbsp.integrations.embeddings import packable_embeddings
from pbsp.models.blocks import linear_weight
from pbsp.models.precision import storage_dtype, stored_tensors
from pbsp.quantization.rows import dequantize_rows, row_bytes, width_for
from pbsp.storage.bits import CODES, TensorSpec
from pbsp.storage.safetensors_file import safetensors_bytes


def file_bytes(model: PreTrainedModel, plan: Plan, config: Config, embedding_bits: int) -> int:
    """Size of the model's one weight file with its linears as planned, to the byte."""
    dtype = storage_dtype(model, config.dtype)
    block = config.build().block  # pyright: ignore[reportAttributeAccessIssue] - plans are of planes
    embeddings = packable_embeddings(model) if embedding_bits < 16 else {}
    tensors: list[tuple[str, TensorSpec]] = []
    for key, tensor in stored_tensors(model):
        name = key.removesuffix(f".{CODES}")
        if name in plan.entries:
            module = model.get_submodule(name)
            rows, columns = linear_weight(module).shape
            form = entry_form(plan.entries[name], rows, columns, block)
            tensors += [(f"{name}.{suffix}", spec) for suffix, spec in form.specs().items()]
        elif name in embeddings:
            columns = tensor.shape[1]
            shape = len(tensor), row_bytes(columns, width_for(columns, embedding_bits))
            tensors.append((key, TensorSpec(shape, torch.uint8, "")))
        else:
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            tensors.append((key, TensorSpec(tuple(tensor.shape), kept, "")))
    return safetensors_bytes(tensors, {"format": "pt"})


def planned_bits(model: PreTrainedModel, plan: Plan, block: int) -> float:
    """Stored bits per weight over all linear layers, as `CompressionReport.stored_bits` will say."""
    bits = weights = 0
    for name, entry in plan.entries.items():
        rows, columns = linear_weight(model.get_submodule(name)).shape
        bits += entry_bits(entry, rows, columns, block)
        weights += rows * columns
    for name in plan.left_uncompressed:
        left = linear_weight(model.get_submodule(name)).numel()
        bits += 16 * left
        weights += left
    return bits / weights


def plan_of_size(model: PreTrainedModel, config: Config, costs: Costs, embedding_bits: int) -> Plan:
    """The plan of least expected loss whose weight file takes at most `config.file_size` bytes.

    Raises:
        ConfigError: not even the smallest plan fits.
    """
    assert config.file_size is not None
    budget = 8 * config.file_size
    for _ in range(8):  # the header's length depends on the plan, a little
        try:
            plan = costs.plan(budget)
        except ConfigError:
            smallest = file_bytes(model, costs.smallest(), config, embedding_bits)
            raise ConfigError(
                f"no plan fits in {config.file_size:,} bytes: the smallest takes {smallest:,}"
            ) from None
        over = file_bytes(model, plan, config, embedding_bits) - config.file_size
        if over <= 0:
            return plan
        budget = min(budget, costs.bits(plan)) - 8 * over
    raise AssertionError("the budget does not settle")


@torch.no_grad()
def embedding_loss(model: PreTrainedModel, tokens: Int64[Tensor, "windows context"], bits: int) -> float:
    """Nats per token that embeddings and head of so many bits add on these windows, all else as it is."""
    matrices = packable_embeddings(model)
    if not matrices:
        return 0.0
    found: list[float] = []
    moment = head_moment(model, lambda: found.append(mean_loss(model, tokens)))
    kept = {weight: weight.detach().clone() for weight in matrices.values()}
    try:
        for weight in kept:
            width = width_for(weight.shape[1], bits)
            multiplied = weight is getattr(model.get_output_embeddings(), CODES)
            packed = round_head(weight, width, moment if multiplied else None)
            weight.copy_(dequantize_rows(packed, width, weight.dtype))
        return mean_loss(model, tokens) - found[0]
    finally:
        for weight, values in kept.items():
            weight.copy_(values)
