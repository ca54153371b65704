"""Moments of a value projection's inputs, weighted by the attention that its outputs go through.

An error in the values reaches the rest of the model only as the attention mixes it. If the rows of kv
head j change by D, the outputs of its query heads h change by A_h X Dᵀ, so their squared change is
tr(D S_j Dᵀ) with S_j = Xᵀ (Σ_h A_hᵀ A_h) X / tokens. The plain moment XᵀX / tokens instead counts every
token once, also those that hardly any position looks at, or that nearly all look at.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pbsp.calibration.attention_calls import AttentionCall, watched_attention
from pbsp.distributed import Ranks
from pbsp.models.blocks import Block

QUERY_ROWS = 256
"""Query positions of a window that count by default.

On SmolLM2-135M's shapes they lengthen calibration by 14 % in windows of 1024 tokens, 512 positions by 32 %
and all of them by 97 %.
"""

_NOT_ONE_LINEAR = "its values are not the outputs of one linear layer as they are"
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative RMS; 16-bit types round at 1e-2


@dataclass(frozen=True)
class ValueHeads:
    """Which output rows of which linear layer are the values of each kv head, in the order of the heads."""

    name: str
    rows: tuple[range, ...]


class ValueMoments:
    """The attention-weighted moments of one block, gathered while its windows run inside `watching`.

    The probabilities are computed beside the model's own attention function, from the same queries and
    keys, so the block's outputs are exactly those of an unwatched run. Nothing is believed: the value
    projection is the linear layer whose outputs are the values, number by number, and probabilities
    times values must give the attention's output. Where that fails, `reason` says so.

    Args:
        block: its linear layers are still dense.
        query_rows: at most so many query positions of a window are used, one drawn from each of as
            many equal stretches, and counted up to the whole; a mean over draws is exact.
        seed: of the draws.
        skipped: windows before the first that is seen here, whose draws are another process's.
    """

    def __init__(self, block: Block, *, query_rows: int = QUERY_ROWS, seed: int = 0, skipped: int = 0):
        self.heads: ValueHeads | None = None
        self.reason = ""
        self.watched = block.name
        self._block = block
        self._query_rows = query_rows
        self._generator = torch.Generator().manual_seed(seed)
        self._skipped = skipped
        self._totals: list[Tensor] = []
        self._tokens = 0
        self._calls = 0  # of attention functions, in the current window
        self._linear_calls: dict[str, tuple[Tensor, Tensor]] = {}  # before the attention, in this window

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe every call of the block until the end of the context."""
        with ExitStack() as hooks:
            hooks.enter_context(self._block.module.register_forward_pre_hook(self._begin_window))
            for name, module in self._block.linears().items():
                hooks.enter_context(module.register_forward_hook(self._linear_hook(name)))
            hooks.enter_context(watched_attention(self._observe))
            yield
        self._linear_calls.clear()
        if not self._tokens and not self.reason:
            self.reason = "its attention is not computed by one of transformers' attention functions"

    def add_ranks(self, ranks: Ranks) -> None:
        """Make the moments those of all ranks' windows, if none has a reason against it."""
        found = ranks.gather((self.reason, self.heads, self._tokens))
        if any(heads != self.heads for _, heads, _ in found):
            self.reason = _NOT_ONE_LINEAR
        self.reason = next((reason for reason, _, _ in found if reason), self.reason)
        if self.reason:
            self._totals.clear()
        for total in self._totals:
            ranks.add(total)
        self._tokens = sum(tokens for _, _, tokens in found)

    def means(self) -> list[Float[Tensor, "in in"]]:
        """S_j of every kv head, in the order of `heads`; symmetric, float32. To be taken once."""
        totals, self._totals = self._totals, []  # divided in place: many kv heads fill gigabytes
        return [total.div_(self._tokens) for total in totals]

    def _begin_window(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls = 0
        self._linear_calls.clear()

    def _linear_hook(self, name: str) -> Callable:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            wanted = not self._calls if self.heads is None else self.heads.name == name
            if wanted and not self.reason:
                self._linear_calls[name] = (args[0], output)

        return after

    def _observe(self, call: AttentionCall) -> None:
        self._calls += 1
        if self.reason:
            return
        self.watched = next(
            f"{self._block.name}.{name}"
            for name, module in self._block.module.named_modules()
            if module is call.module
        )
        self.reason = self._add(call)
        if self.reason:
            self._totals.clear()
        self._linear_calls.clear()

    def _add(self, call: AttentionCall) -> str:
        """Count the window in; the reason, if it cannot be."""
        if self._calls > 1:
            return "its block has more than one attention"
        if call.implementation not in ("sdpa", "eager", None) or call.kwargs.get("position_bias") is not None:
            return f"no probabilities can be had of its attention ({call.implementation})"
        values = call.value[0].transpose(0, 1)
        if self.heads is None:
            outputs = {name: output for name, (_, output) in self._linear_calls.items()}
            self.heads = find_values(values, outputs)
        if self.heads is None or self.heads.name not in self._linear_calls:
            return _NOT_ONE_LINEAR
        inputs = self._linear_calls[self.heads.name][0]
        inputs = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        while self._skipped:
            draw_query_rows(len(values), self._query_rows, generator=self._generator)
            self._skipped -= 1
        rows = draw_query_rows(len(values), self._query_rows, generator=self._generator).to(inputs.device)
        probabilities = call.probabilities(rows)
        if probabilities is None:
            return "its attention returns no probabilities"
        if not _reproduces(probabilities, values, call.output[0, rows]):
            return "its attention's output is not its probabilities times its values"
        grouped = probabilities.float().unflatten(0, (len(self.heads.rows), -1))
        if not self._totals:
            self._totals = [inputs.new_zeros(inputs.shape[1], inputs.shape[1]) for _ in grouped]
        for total, group in zip(self._totals, grouped, strict=True):
            total.add_(attended_gram(group, inputs), alpha=len(values) / len(rows))
        self._tokens += len(values)
        return ""


def find_values(
    values: Float[Tensor, "tokens kv_heads head_dim"], outputs: dict[str, Tensor]
) -> ValueHeads | None:
    """The linear layer, and its rows, whose outputs equal the values exactly; None if there is none.

    Known orders of a layer's rows: the values last, head after head (also: nothing but the values), or
    every head with its own queries, keys and values, these last.
    """
    _, heads, size = values.shape
    for name, output in outputs.items():
        flat = output.reshape(-1, output.shape[-1])
        width = flat.shape[1]
        if len(flat) != len(values) or width < heads * size:
            continue
        start = width - heads * size
        orders = [tuple(range(start + j * size, start + (j + 1) * size) for j in range(heads))]
        if width % heads == 0:
            stride = width // heads
            orders.append(tuple(range(end - size, end) for end in range(stride, width + 1, stride)))
        for rows in orders:
            parts = [flat[:, head.start : head.stop] for head in rows]
            if all(torch.equal(part, values[:, j]) for j, part in enumerate(parts)):
                return ValueHeads(name, rows)
    return None


def draw_query_rows(context: int, count: int, *, generator: torch.Generator) -> Int64[Tensor, "queries"]:
    """All positions, or `count` of them in order, one from each of `count` equal stretches.

    Every position is expected count/context times, so context/count times a sum over the drawn ones is
    an unbiased estimate of the sum over all.
    """
    if count >= context:
        return torch.arange(context)
    places = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    return (places * (context / count)).long().clamp_max(context - 1)


def attended_gram(
    probabilities: Float[Tensor, "heads queries tokens"], inputs: Float[Tensor, "tokens in"]
) -> Float[Tensor, "in in"]:
    """Σ_h (A_h X)ᵀ (A_h X), by the cheaper of two orders of multiplication."""
    mixing = probabilities.flatten(0, 1)
    queries, (tokens, width) = len(mixing), inputs.shape
    if queries * width * (tokens + width) <= tokens * (queries * tokens + width * (tokens + width)):
        mixed = mixing @ inputs
        return mixed.T @ mixed
    gram = inputs.T @ ((mixing.T @ mixing) @ inputs)
    return (gram + gram.T) / 2


def _reproduces(
    probabilities: Float[Tensor, "heads queries tokens"],
    values: Float[Tensor, "tokens kv_heads head_dim"],
    expected: Tensor,
) -> bool:
    """Whether probabilities times values give the attention's own output, (queries, heads, head_dim)."""
    heads = len(probabilities)
    if heads % values.shape[1] or expected.shape[1] != heads:
        return False
    repeated = values.transpose(0, 1).repeat_interleave(heads // values.shape[1], 0)
    found = (probabilities @ repeated.to(probabilities.dtype)).transpose(0, 1)
    error = (found - expected).double().norm() / expected.double().norm().clamp_min(1e-30)
    return float(error) <= _TOLERANCE.get(expected.dtype, 3e-2)
