"""How much an error in a linear layer's output raises the model's loss, from one backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.gradients import BackwardWalk
from pbsp.calibration.moment import Moment
from pbsp.distributed import ALONE, Ranks
from pbsp.models.blocks import Block, linear_weight
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
    ranks: Ranks = ALONE,
) -> None:
    """Call `visit` with the sensitivity of every linear that the windows reach, the last block first.

    Args:
        tokens: the loss is the model's own on them.
        visit: told one linear at a time, while its block's weights are in memory; the sensitivities of
            one block alone are held.
        progress: told blocks done and blocks in all.
        ranks: processes that share the windows, and the linears: each `visit`s a part of these, dealt as if
            a visit inverts the moment.

    Raises:
        CalibrationError, ModelError: see `BackwardWalk`.
    """
    own = ranks.part(len(tokens))
    walk = BackwardWalk(model, blocks, tokens[own.start : own.stop]) if own else None
    for done, block in enumerate(reversed(blocks)):
        if progress:
            progress(done, len(blocks))
        linears = block.linears()
        gathered: dict[str, _Gathered] = {}
        with resident(model, block.name):
            if walk:  # there may be more ranks than windows
                walk.step(partial(_gather, gathered, linears))
            merged = _over_ranks(gathered, linears, ranks)
            owners = ranks.deal([linear_weight(linears[name]).shape[1] ** 3 for name in merged])
            own_sums = [
                sums for sums, owner in zip(merged.items(), owners, strict=True) if owner == ranks.rank
            ]
            for name, sums in own_sums:
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


def token_weights(lengths: Float[Tensor, "tokens"], *, squares: bool = False) -> Float[Tensor, "tokens"]:
    """Weights with mean 1 in proportion to gradient lengths, or `squares`; without any gradient all alike.

    A second-order loss asks for their squares. But so few tokens have nearly all of these that a moment would
    be of these few: in half of SmolLM2's value projections of 138 out of 32,768, by Kish's formula
    (Σw)² / Σw², in the worst of 9, for 576 features. By lengths none is of fewer than 3,325.

    Args:
        lengths: squared, as they are kept.
    """
    weights = lengths if squares else lengths.sqrt()
    mean = float(weights.mean())
    return weights / mean if mean > 0 else torch.ones_like(lengths)


def cut_lengths(squared: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """A window's squared gradient lengths, cut off at what one token in a thousand exceeds.

    Single tokens can have gradients so large that they alone would decide what a layer seems to be worth:
    cut, the rank correlation with what layers cost was 0.84 instead of 0.75 (benchmarks/sensitivity.py).
    """
    return squared.clamp_max(torch.quantile(squared, _CUT))


def _token_rows(values: Float[Tensor, "*tokens features"]) -> Float[Tensor, "all features"]:
    return values.reshape(-1, values.shape[-1]).float()


def _gather(
    into: dict[str, "_Gathered"],
    linears: dict[str, nn.Module],
    window: int,
    name: str,
    inputs: Tensor,
    gradient: Tensor,
) -> None:
    if name not in into:
        into[name] = _Gathered(linears[name])
    into[name].add(inputs, gradient)


class _Gathered:
    """Sums over the tokens seen so far, the windows in the order in which they come.

    Attributes:
        lengths: of the tokens' gradients, cut, a tensor a window.
    """

    def __init__(self, linear: nn.Module) -> None:
        weight = linear_weight(linear)
        self._moment = Moment()
        self._columns = weight.shape[1]
        self._energy = torch.zeros(len(weight), device=weight.device)
        self.lengths: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "*tokens in"], gradient: Float[Tensor, "*tokens out"]) -> None:
        if not gradient.numel():
            return
        squares = _token_rows(gradient).square()
        lengths = squares.sum(1)
        cut = cut_lengths(lengths)
        self._moment.update(_token_rows(inputs) * cut.sqrt()[:, None])
        self._energy += (cut / lengths.clamp_min(1e-30)) @ squares
        self.lengths.append(cut)

    def add_ranks(self, ranks: Ranks, lengths: list[Tensor]) -> None:
        """Make these the sums over all ranks, which call it together; `lengths` are those of all."""
        self.lengths = lengths
        ranks.add(self._energy)
        tokens = sum(len(one) for one in lengths)
        zero = partial(self._energy.new_zeros, (self._columns, self._columns))
        self._moment.add_ranks(ranks, tokens=tokens, zero=zero)

    def sensitivity(self) -> Sensitivity:
        lengths = torch.cat(self.lengths)
        mean = float(lengths.mean())
        energy = self._energy / len(lengths)
        return Sensitivity(self._moment.mean() / max(mean, 1e-30), energy, lengths)


def _over_ranks(
    gathered: dict[str, _Gathered], linears: dict[str, nn.Module], ranks: Ranks
) -> dict[str, _Gathered]:
    """The sums over all ranks' windows, of every linear that one of them reaches."""
    found = ranks.gather({name: sums.lengths for name, sums in gathered.items()})
    merged = {
        name: gathered.get(name) or _Gathered(linears[name])
        for name in dict.fromkeys(name for one in found for name in one)
    }
    for name, sums in merged.items():
        sums.add_ranks(ranks, [lengths for one in found for lengths in one.get(name, [])])
    return merged
