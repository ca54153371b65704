"""Where a processor multiplies matrices of bfloat16 much faster, float32 models may do so while tuned."""

from contextlib import AbstractContextManager, nullcontext

import torch


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which `quick_products` multiplies the matrices of a model of this type."""
    quick = dtype == torch.float32 and device.type == "cpu" and _has_matrix_instructions()
    return torch.bfloat16 if quick else dtype


def quick_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """While it lasts, linear layers and attention round their inputs to bfloat16 where that is faster.

    Hidden states, norms, losses and the gradients of weights stay in float32. That is exact enough to tune
    by, not to compare models by: of SmolLM2-135M's gradients the squared error is 4e-4 of the square.
    """
    if products_dtype(dtype, device) == dtype:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _has_matrix_instructions() -> bool:
    """Whether the processor has AMX: on a Xeon without, bfloat16 took longer than float32."""
    return torch.cpu._is_amx_tile_supported()
