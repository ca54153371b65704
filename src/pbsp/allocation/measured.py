"""What every linear layer is stored as: what is expected to cost the model least within a budget of bits."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.allocation.budget import Choice, allocate
from pbsp.allocation.entry import Entry, entry_bits, fits
from pbsp.allocation.menu import MENU, PROBES, entry_fit, errors_from_probes
from pbsp.allocation.plan import Plan, uniform_plan
from pbsp.calibration.sensitivity import Sensitivity, measure_sensitivities
from pbsp.distributed import ALONE, Ranks
from pbsp.errors import CalibrationError
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import Block, linear_weight

_PROBED_ROWS = 32
_FARTHEST = 8.0  # a trial says at most that a layer costs so many times more, or less, than expected,
_TRUSTED = 0.65  # and of its logarithm so much is believed: two trials' correlation, see docs/experiments.md


@dataclass(frozen=True)
class LayerCosts:
    """What one linear layer could be stored as, and what that would cost.

    Attributes:
        weights: how many it has.
        choices: entry of the menu → its bits, and the nats per token that it is expected to add.
    """

    weights: int
    choices: dict[Entry, Choice]


@dataclass(frozen=True)
class Costs:
    """The costs of all linear layers, of which plans for any budget follow.

    Attributes:
        tiling: the layers that can have planes, and those that cannot.
        layers: by name; of layers with one weight tensor only the first.
        left_bits: of the layers that cannot, in 16 bit.
        lengths: linear layer → the squared lengths of its tokens' gradients, see `Sensitivity`.
    """

    tiling: Plan
    layers: dict[str, LayerCosts]
    left_bits: int
    lengths: dict[str, Tensor]

    @property
    def weights(self) -> int:
        """Weights of all linear layers, as `CompressionReport.stored_bits` counts them."""
        return self.left_bits // 16 + sum(
            self.layers[name].weights * users for name, users in self._users().items()
        )

    def plan(self, budget: int) -> Plan:
        """The entries with the least expected loss whose bits, with the left layers', are within the budget.

        Raises:
            ConfigError: the budget is too small.
        """
        users = self._users()
        parts = [
            [Choice(choice.bits * users[name], choice.loss) for choice in layer.choices.values()]
            for name, layer in self.layers.items()
        ]
        chosen = allocate(parts, budget - self.left_bits)
        entries = {
            name: list(layer.choices)[index]
            for (name, layer), index in zip(self.layers.items(), chosen, strict=True)
        }
        entries = {name: entries[self.tiling.same_as.get(name, name)] for name in self.tiling.entries}
        return replace(self.tiling, entries=entries)

    def smallest(self) -> Plan:
        """The plan of the fewest bits."""
        users = self._users()
        least = (min(layer.choices.values()).bits * users[name] for name, layer in self.layers.items())
        return self.plan(self.left_bits + sum(least))

    def bits(self, plan: Plan) -> int:
        """What the plan stores, layers that are left as they are included."""
        users = self._users()
        planned = (self.layers[name].choices[plan.entries[name]].bits * users[name] for name in self.layers)
        return self.left_bits + sum(planned)

    def expected_loss(self, plan: Plan) -> float:
        """Nats per token that the plan is expected to add: the layers' in sum."""
        return sum(layer.choices[plan.entries[name]].loss for name, layer in self.layers.items())

    def corrected(self, plan: Plan, losses: Mapping[str, float]) -> "Costs":
        """The same where a trial of the plan found these losses instead of the expected ones.

        Every choice of a layer is scaled by what the layer cost against expectation, all layers together
        having cost as much as expected.

        Args:
            losses: linear layer → nats per token, of layers that the trial reached.
        """
        found: dict[str, float] = {}
        for name, loss in losses.items():
            owner = self.tiling.same_as.get(name, name)
            found[owner] = found.get(owner, 0.0) + loss
        expected = {name: self.layers[name].choices[plan.entries[name]].loss for name in found}
        expected = {name: loss for name, loss in expected.items() if loss > 0}
        overall = sum(found[name] for name in expected) / max(sum(expected.values()), 1e-30)
        if not 0 < overall < float("inf"):
            return self
        factors = {
            name: min(max(found[name] / overall / loss, 1 / _FARTHEST), _FARTHEST) ** _TRUSTED
            for name, loss in expected.items()
        }
        after = sum(factors[name] * loss for name, loss in expected.items())
        scale = sum(expected.values()) / after
        layers = {
            name: replace(
                layer,
                choices={
                    entry: Choice(choice.bits, choice.loss * scale * factors.get(name, 1.0))
                    for entry, choice in layer.choices.items()
                },
            )
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def _users(self) -> Counter[str]:
        return Counter(self.tiling.same_as.get(name, name) for name in self.tiling.entries)


def measure_costs(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Int64[Tensor, "windows context"],
    method: PlaneFit,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Costs:
    """Find out by one backward pass over the windows, and by two trial fits of some rows of every layer.

    Args:
        method: its block, damping and sweeps; its patterns do not matter.
        strict: as in `uniform_plan`.
        progress: told blocks done and blocks in all.
        ranks: processes that share the windows and the trials; the costs are the same on all.

    Raises:
        CalibrationError, ModelError: see `measure_sensitivities`.
        PatternError: no layer can take planes, or, with `strict`, one cannot.
    """
    tiling = uniform_plan(blocks, PROBES[1], strict=strict)
    modules = {name: module for block in blocks for name, module in block.linears().items()}
    found: dict[str, LayerCosts] = {}
    lengths: dict[str, Tensor] = {}

    def visit(name: str, sensitivity: Sensitivity) -> None:
        lengths[name] = sensitivity.lengths
        if name in tiling.entries and name not in tiling.same_as:
            try:
                found[name] = _costs(linear_weight(modules[name]).float(), sensitivity, method)
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from None

    measure_sensitivities(model, blocks, tokens, visit, progress=progress, ranks=ranks)
    for others_found, others_lengths in ranks.gather((found, lengths)):
        found |= others_found
        lengths |= others_lengths
    left_bits = 16 * sum(linear_weight(modules[name]).numel() for name in tiling.left_uncompressed)
    names = [name for name in tiling.entries if name not in tiling.same_as]
    unseen = {
        name: _unseen(linear_weight(modules[name]), method.block) for name in names if name not in found
    }
    layers = {name: found.get(name) or unseen[name] for name in names}
    return Costs(tiling, layers, left_bits, lengths)


def _costs(weight: Float[Tensor, "out in"], sensitivity: Sensitivity, method: PlaneFit) -> LayerCosts:
    rows, columns = weight.shape
    every = torch.arange(rows, device=weight.device)
    worth = float(sensitivity.row_losses(weight, every).sum())
    sample = torch.linspace(0, rows - 1, min(_PROBED_ROWS, rows), device=weight.device).round().long()
    some = weight[sample]
    whole = float(sensitivity.row_losses(some, sample).sum())
    tried = []
    for entry in PROBES:
        left = some - entry_fit(entry, method).compress(some, sensitivity.moment).dense()
        tried.append(float(sensitivity.row_losses(left, sample).sum()) / max(whole, 1e-30))
    errors = errors_from_probes(tried[0], tried[1], method.block, method.sweeps)
    choices = {
        entry: Choice(entry_bits(entry, rows, columns, method.block), worth * errors[entry])
        for entry in _fitting(columns)
    }
    return LayerCosts(weight.numel(), choices)


def _unseen(weight: Float[Tensor, "out in"], block: int) -> LayerCosts:
    """Of a layer that the windows never reach: nothing says that it matters."""
    rows, columns = weight.shape
    choices = {entry: Choice(entry_bits(entry, rows, columns, block), 0.0) for entry in _fitting(columns)}
    return LayerCosts(weight.numel(), choices)


def _fitting(columns: int) -> list[Entry]:
    return [entry for entry in MENU if fits(entry, columns)]
