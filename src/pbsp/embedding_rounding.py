"""How the head, and the embedding tied to it, are rounded to 4 bits: under the moment of its inputs."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.moments import collect_moments
from pbsp.methods.integers import rounded_rows
from pbsp.quantization.rows import quantize_rows
from pbsp.solver.hessian import damped, inverse_factor

_DAMPING = 0.1  # a tied matrix is looked up, too, and there plain rounding is best
_ROWS_AT_ONCE = 4096


def head_moment(
    model: PreTrainedModel, run: Callable[[], object]
) -> Float[Tensor, "features features"] | None:
    """The moment of the head's inputs while the model is `run`; None where the head is more than a product.

    Raises:
        CalibrationError: it is not finite.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        run()
        return None
    return collect_moments({"the head": head}, run).get("the head")


@torch.no_grad()
def round_head(
    weight: Float[Tensor, "rows columns"], bits: int, moment: Float[Tensor, "columns columns"] | None
) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of `quantization.rows`; in 4 bit, given the moment, rounded under it.

    In 8 bit rounding to the nearest already loses next to nothing.
    """
    if bits == 8 or moment is None:
        return quantize_rows(weight, bits)
    factor = inverse_factor(damped(moment.to(weight.device), _DAMPING)).float()
    parts = weight.detach().float().split(_ROWS_AT_ONCE)
    return torch.cat([rounded_rows(part, factor, bits) for part in parts])
