"""How much a weight matters: the scores by which N of every M are kept (CFS's fine stage and its rivals)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may look at, for one block of columns.

    Attributes:
        weight: the target, as moved by the blocks before it.
        energy: diagonal of the inputs' moment, mean of x_j² over tokens.
        factor_diagonal: diagonal of the upper U with UᵀU = H⁻¹.
        seed: of the random score.
    """

    weight: Float[Tensor, "out in"]
    energy: Float[Tensor, "in"]
    factor_diagonal: Float[Tensor, "in"]
    seed: int = 0


def random(inputs: ScoreInputs) -> Float[Tensor, "out in"]:
    """Uniform noise: the control that knows nothing."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return torch.rand(inputs.weight.shape, generator=generator).to(inputs.weight)


def magnitude(inputs: ScoreInputs) -> Float[Tensor, "out in"]:
    """|w|."""
    return inputs.weight.abs()


def wanda(inputs: ScoreInputs) -> Float[Tensor, "out in"]:
    """|w|·‖x_j‖ (Wanda, arXiv 2306.11695)."""
    return inputs.weight.abs() * inputs.energy.sqrt()


def si(inputs: ScoreInputs) -> Float[Tensor, "out in"]:
    """(|w|/Σ column + |w|/Σ row)·‖x_j‖^½, the standardized importance of STBLLM (arXiv 2408.01803)."""
    size = inputs.weight.abs()
    share = size / size.sum(0, keepdim=True).clamp_min(1e-30) + size / size.sum(1, keepdim=True).clamp_min(
        1e-30
    )
    return share * inputs.energy.sqrt().sqrt()


def hessian(inputs: ScoreInputs) -> Float[Tensor, "out in"]:
    """w² / U_jj² (arXiv 2502.01705 eq. 8, with U_jj for [H⁻¹]_jj as SparseGPT and BiLLM compute it)."""
    return inputs.weight.square() / inputs.factor_diagonal.square()


SCORES: dict[str, Callable[[ScoreInputs], Tensor]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "si": si,
    "hessian": hessian,
}


def removal_cost(
    weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"], metric: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """Exact rise of (w − q) G (w − q)ᵀ when one entry of q becomes 0 and nothing else moves.

    The score `residual`: with R = W − Q it is 2·(R G)_j q_j + G_jj q_j².
    """
    slope = (weight - approximation) @ metric
    return 2 * slope * approximation + metric.diagonal() * approximation.square()
