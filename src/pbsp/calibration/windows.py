"""Token windows: what calibration and evaluation both run the model on, and where they came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.errors import CorpusError


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, and what a reader must know to get the same ones.

    Attributes:
        tokens: token ids on the CPU.
        text: name of the text: `self`, a named corpus, or the file's name without its folder.
        split: which part of the text they are from.
        text_digest: SHA-256 of the text itself, uncompressed; for `self` of the tokens.
        requested: windows that were asked for; None for all of them.
        seed: of the sampling or of the choice of windows; None where nothing was drawn.
        scored_from: the targets of an evaluation are the positions after this one. 0: all but the
            first, which has nothing before it (for `self` that is the start token, not sampled).
        note: what a user may not expect, such as "3 of 128 samples"; empty if there is nothing.
    """

    tokens: Int64[Tensor, "windows context"]
    text: str
    split: str
    text_digest: str
    requested: int | None = None
    seed: int | None = None
    scored_from: int = 0
    note: str = ""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def context(self) -> int:
        """Tokens of one window."""
        return self.tokens.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the token ids, row by row as little-endian int32."""
        return tokens_digest(self.tokens)

    def describe(self) -> dict[str, Any]:
        """Everything but the tokens, as plain JSON values."""
        return {
            "text": self.text,
            "split": self.split,
            "windows": len(self),
            "context": self.context,
            "tokens": self.tokens.numel(),
            "requested": self.requested,
            "seed": self.seed,
            "digest": self.digest,
            "text_digest": self.text_digest,
            "note": self.note,
        }

    def were_calibrated_on(self, calibration: Mapping[str, Any] | None) -> bool:
        """Whether a model whose calibration `describe()`s so has seen the text of these windows."""
        return calibration is not None and calibration.get("text_digest") == self.text_digest


def tokens_digest(tokens: Int64[Tensor, "windows context"]) -> str:
    """SHA-256 of token ids, row by row as little-endian int32."""
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i4").tobytes()).hexdigest()


def whole_windows(
    stream: Int64[Tensor, "tokens"], context: int, *, name: str
) -> Int64[Tensor, "windows context"]:
    """The stream cut into windows, the last partial one dropped; CorpusError if not one is whole."""
    count = len(stream) // context
    if count == 0:
        shorter = f", or a context of at most {len(stream)}" if len(stream) > 1 else ""
        raise CorpusError(
            f"{name} has {len(stream)} tokens, fewer than one window of {context}; "
            f"name a longer text{shorter}"
        )
    return stream[: count * context].view(count, context)


def draw_windows(
    windows: Int64[Tensor, "all context"], samples: int, *, seed: int
) -> Int64[Tensor, "drawn context"]:
    """`samples` of the windows drawn without repetition, in the order of the text; all if there are fewer."""
    if len(windows) <= samples:
        return windows
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples].sort().values]


def check_fit(model: PreTrainedModel, context: int, largest_token: int = 0) -> None:
    """Raise CorpusError if the model has no position, or no embedding, for what it would be given."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise CorpusError(
            f"windows of {context} tokens do not fit a model of {positions} positions; "
            f"choose a context of at most {positions}"
        )
    if largest_token >= config.vocab_size:
        raise CorpusError(
            f"the text has token {largest_token}, but the model knows only {config.vocab_size}; "
            "the tokenizer is another model's"
        )
