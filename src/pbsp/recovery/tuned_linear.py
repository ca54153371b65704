"""What all linear layers have in common while they are tuned."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.planes import Planes

THRESHOLD_MARGIN = 0.02
"""Of a scale: latents on the threshold to another code would all turn in the first step."""
LARGEST_LATENT = 1.5
"""Of a scale: no weight shall need many steps to change its code."""


class TunedLinear(nn.Module, ABC):
    """Y = x Wᵀ + bias, where W is what the representation stands for after the last `refresh`.

    Scales are `first · (1 + change)`, so that one step size fits all layers. Codes follow from latents, in
    units of scales. Both are rounded to what the file can hold in `refresh`, and the gradient passes the
    rounding as if it were not there (straight-through): `pull` takes it from W's, so that codes are found
    once a step, however many windows or checkpoints a step has.

    Attributes:
        weight: W, a leaf of the graph; its gradient is what `pull` uses up.
    """

    def __init__(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, *, conv1d: bool
    ) -> None:
        """`conv1d` is what `PackedLinear` says of itself."""
        super().__init__()
        self.conv1d = conv1d
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make `weight` what scales and codes are now."""
        self.weight.copy_(self.representation().dense())

    @torch.no_grad()
    def pull(self) -> None:
        """Turn the gradient of `weight`, none where it was not called, into those of scales and codes."""
        if self.weight.grad is not None:
            self._pull(self.weight.grad)
            self.weight.grad = None

    @abstractmethod
    def changes(self) -> list[nn.Parameter]:
        """Relative changes of scales, zero at first."""

    @abstractmethod
    def codes(self) -> list[nn.Parameter]:
        """Latents; none where codes stay as they are."""

    @abstractmethod
    def representation(self) -> Planes | LowRankBinary:
        """The matrix as it is now, with scales and codes that can be stored."""

    @abstractmethod
    def _pull(self, gradient: Float[Tensor, "out in"]) -> None:
        """Set the gradients of `changes` and `codes`, given that of W."""
