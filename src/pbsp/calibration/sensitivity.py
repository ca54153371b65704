"""How much an error in a linear layer's output raises the model's loss, from one backward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.calibration.gradients import BackwardWalk
from pbsp.calibration.moments import Moment
from pbsp.models.blocks import Block
from pbsp.models.shards import resident

_CUT = 0.999


@dataclass(frozen=True)
class Sensitivity:
    """What the loss's gradients say of one linear layer.

    Attributes:
        moment: of its inputs, tokens weighted by the squared length of the gradient at the output (see
            `cut_lengths`); the weights' mean is 1.
        row_energy: mean over tokens of the squared gradient at each output, in nats² per unit².
        lengths: the squared lengths of its tokens' gradients, in the order in which it was called on them.
    """

    moment: Float[Tensor, "in in"]
    row_energy: Float[Tensor, "out"]
    lengths: Float[Tensor, "tokens"]

    def row_losses(self, difference: Float[Tensor, "rows in"], rows: Tensor) -> Float[Tensor, "rows"]:
        """What a change of these rows adds to the loss, in nats per token, for each of them.

        To second order, with the squared gradient as curvature (empirical Fisher) and rows taken as
        independent: ½ E[gᵢ²] · dᵢ S dᵢᵀ.
        """
        return 0.5 * self.row_energy[rows] * ((difference @ self.moment) * difference).sum(1)


def measure_sensitivities(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Int64[Tensor, "windows context"],
    visit: Callable[[str, Sensitivity], None],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Call `visit` with the sensitivity of every linear that the windows reach, the last block first.

    Args:
        tokens: the loss is the model's own on them.
        visit: told one linear at a time, while its block's weights are in memory; the sensitivities of
            one block alone are held.
        progress: told blocks done and blocks in all.

    Raises:
        CalibrationError, ModelError: see `BackwardWalk`.
    """
    walk = BackwardWalk(model, blocks, tokens)
    for done in range(len(blocks)):
        if progress:
            progress(done, len(blocks))
        gathered: dict[str, _Gathered] = {}

        def watch(window: int, name: str, inputs: Tensor, gradient: Tensor, into: dict = gathered) -> None:
            into.setdefault(name, _Gathered()).add(inputs, gradient)

        with resident(model, blocks[-1 - done].name):
            walk.step(watch)
            for name, sums in gathered.items():
                visit(name, sums.sensitivity())


def gradient_lengths(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Int64[Tensor, "windows context"],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Float[Tensor, "tokens"]]:
    """For every linear the squared lengths of the gradients at its output, cut; windows in order.

    Args:
        tokens: few windows: their hidden states before all blocks are held.
        progress: told blocks done and blocks in all.
    """
    walk = BackwardWalk(model, blocks, tokens)
    found: dict[str, list[Tensor]] = {}

    def watch(window: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        if gradient.numel():
            squares = _token_rows(gradient).square()
            found.setdefault(name, []).append(cut_lengths(squares.sum(1)))

    for done in range(len(blocks)):
        if progress:
            progress(done, len(blocks))
        walk.step(watch)
    return {name: torch.cat(lengths) for name, lengths in found.items()}


def token_weights(lengths: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """Weights with mean 1 in proportion to squared gradient lengths; without any gradient all alike."""
    mean = float(lengths.mean())
    return lengths / mean if mean > 0 else torch.ones_like(lengths)


def cut_lengths(squared: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """A window's squared gradient lengths, cut off at what one token in a thousand exceeds.

    Single tokens can have gradients so large that they alone would decide what a layer seems to be worth:
    cut, the rank correlation with what layers cost was 0.84 instead of 0.75 (benchmarks/sensitivity.py).
    """
    return squared.clamp_max(torch.quantile(squared, _CUT))


def _token_rows(values: Float[Tensor, "*tokens features"]) -> Float[Tensor, "all features"]:
    return values.reshape(-1, values.shape[-1]).float()


class _Gathered:
    """Sums over the tokens seen so far, the windows in the order in which they come."""

    def __init__(self) -> None:
        self._moment = Moment()
        self._energy: Tensor | float = 0.0
        self._lengths: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "*tokens in"], gradient: Float[Tensor, "*tokens out"]) -> None:
        if not gradient.numel():
            return
        squares = _token_rows(gradient).square()
        lengths = squares.sum(1)
        cut = cut_lengths(lengths)
        self._moment.update(_token_rows(inputs) * cut.sqrt()[:, None])
        self._energy = self._energy + (cut / lengths.clamp_min(1e-30)) @ squares
        self._lengths.append(cut)

    def sensitivity(self) -> Sensitivity:
        lengths = torch.cat(self._lengths)
        mean = float(lengths.mean())
        energy = torch.as_tensor(self._energy) / len(lengths)
        return Sensitivity(self._moment.mean() / max(mean, 1e-30), energy, lengths)
