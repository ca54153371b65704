"""What every linear layer is to be stored as, and what that was decided by."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from pbsp.allocation.coarse import CoarseAllocation
from pbsp.allocation.entry import format_entry, parse_entry
from pbsp.allocation.plan import Plan


@dataclass(frozen=True)
class Planned:
    """A plan, and where it comes from.

    Attributes:
        embedding_bits: of the input embedding and the head.
        coarse: an allocation over blocks, where that was asked for.
        expected_loss: nats per token that the plan is expected to add, where costs were measured.
        tried: whether it was corrected by a trial.
        token_weights: linear layer → weights of its tokens in its moment; where tokens weigh by gradient.
    """

    plan: Plan
    embedding_bits: int
    coarse: CoarseAllocation | None = None
    expected_loss: float | None = None
    tried: bool = False
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, of all but the weights."""
        entries = {name: format_entry(entry) for name, entry in self.plan.entries.items()}
        plan = {**asdict(self.plan), "entries": entries}
        coarse = None if self.coarse is None else asdict(self.coarse)
        return {
            "plan": plan,
            "embedding_bits": self.embedding_bits,
            "coarse": coarse,
            "expected_loss": self.expected_loss,
            "tried": self.tried,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], token_weights: Mapping[str, Tensor]) -> "Planned":
        """The inverse of `to_dict`."""
        entries = {name: parse_entry(text) for name, text in values["plan"]["entries"].items()}
        plan = Plan(**{**values["plan"], "entries": entries})
        coarse = values["coarse"]
        if coarse is not None:
            lists = {name: tuple(value) for name, value in coarse.items() if name != "rule"}
            coarse = CoarseAllocation(**{**coarse, **lists})
        kept = {name: values[name] for name in ("embedding_bits", "expected_loss", "tried")}
        return Planned(plan, coarse=coarse, token_weights=token_weights, **kept)
