"""What a compression would do, without doing it: the plan, its exact size, about its time and memory."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.allocation.entry import format_entry
from pbsp.allocation.menu import entry_fit
from pbsp.allocation.plan import Plan
from pbsp.allocation.planfile import written_plan
from pbsp.calibration.corpus import Corpus
from pbsp.calibration.moments import collect_moments
from pbsp.calibration.walk import Walk
from pbsp.config import Config
from pbsp.errors import ConfigError
from pbsp.file_size import file_bytes, planned_bits
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import Block, decoder_blocks, linear_weight
from pbsp.models.experts import split_experts
from pbsp.models.precision import check_finite
from pbsp.models.shards import resident, shards_of
from pbsp.planning import check_request, make_plan

_TRIED_ROWS = 64


@dataclass(frozen=True)
class Preview:
    """What `compress` would make of a model.

    Attributes:
        layers: linear layer → its planes or integers, as a plan file has them.
        stored_bits: per weight of all linear layers.
        embedding_bits: of the input embedding and the head, where they can have fewer than 16.
        weight_bytes: of the weight file.
        expected_loss: nats per token, where costs were measured.
        tried: whether the plan was corrected by a trial on a copy.
        seconds: about what calibrating and solving take, from trials on the first block.
        memory_bytes: about the peak: the model and all windows' hidden states, or its largest part where it
            is read block by block; and one block's moments.
    """

    layers: dict[str, str]
    stored_bits: float
    embedding_bits: int
    weight_bytes: int
    expected_loss: float | None
    tried: bool
    seconds: float
    memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def preview(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config,
    *,
    corpus: Corpus,
    progress: Callable[[str, int, int], None],
) -> Preview:
    """Make the plan and stop there; sizes are exact for a model in one weight file.

    Raises:
        ConfigError: the method is not planes.
        PbspError: as `compress`.
    """
    if config.method != "planes":
        raise ConfigError(f"a dry run is of method planes; {config.method} decides its sizes while it solves")
    method = config.build()
    assert isinstance(method, PlaneFit)
    split_experts(model)
    blocks = decoder_blocks(model)
    check_request(blocks, config)
    corpus.check_model(model)
    check_finite(model)
    windows = corpus.windows(tokenizer, model, progress=partial(progress, "sample"))
    planned = make_plan(model, blocks, config, windows.tokens, progress=partial(progress, "plan"))
    return Preview(
        layers=written_plan(planned.plan),
        stored_bits=planned_bits(model, planned.plan, method.block),
        embedding_bits=planned.embedding_bits,
        weight_bytes=file_bytes(model, planned.plan, config, planned.embedding_bits),
        expected_loss=planned.expected_loss,
        tried=planned.tried,
        seconds=_seconds(model, blocks, planned.plan, method, windows.tokens),
        memory_bytes=_memory(model, blocks, windows.tokens),
    )


def _seconds(
    model: PreTrainedModel, blocks: list[Block], plan: Plan, method: PlaneFit, tokens: Tensor
) -> float:
    """Two passes of every window through every block, and every linear's solve, from the first block's."""
    first = blocks[0]
    walk = Walk(model, blocks, tokens[:1])
    with resident(model, first.name):
        start = time.perf_counter()
        walk.run(0, first.module, keep=False)
        passing = time.perf_counter() - start
        start = time.perf_counter()
        collect_moments(first.linears(), lambda: walk.run(0, first.module, keep=False))
        measuring = time.perf_counter() - start
    rates: dict[tuple[int, int | str], float] = {}  # by width, and how many planes or what integers
    solving = 0.0
    for block in blocks:
        for name, module in block.linears().items():
            if name not in plan.entries or name in plan.same_as:
                continue
            rows, columns = linear_weight(module).shape
            entry = plan.entries[name]
            key = columns, format_entry(entry) if isinstance(entry, int) else len(entry)
            if key not in rates:
                trial = entry_fit(entry, method)
                with resident(model, block.name):
                    some = linear_weight(module)[:_TRIED_ROWS].float()
                    start = time.perf_counter()
                    trial.compress(some, torch.eye(columns, device=some.device))
                    rates[key] = (time.perf_counter() - start) / len(some)
            solving += rates[key] * rows
    return len(blocks) * len(tokens) * (passing + measuring) + solving


def _memory(model: PreTrainedModel, blocks: list[Block], tokens: Tensor) -> int:
    """Peak bytes while a block is solved."""
    shards = shards_of(model)
    if shards:
        held = max(shards.part_bytes().values())
    else:
        hidden = tokens.numel() * model.config.hidden_size * model.dtype.itemsize
        held = sum(tensor.nbytes for tensor in model.parameters()) + hidden
    widths = {linear_weight(module).shape[1] for block in blocks for module in block.linears().values()}
    moments = 4 * sum(width**2 for width in widths) + 3 * 8 * max(widths) ** 2
    return held + moments
