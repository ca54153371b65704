"""Text sampled from the model itself, so that calibration and evaluation need no dataset."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList

from pbsp.errors import CorpusError

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""

MAX_BATCH = 32  # one shared core, 135 M model: 19, 49, 105, 127, 129 tokens/s at 1, 8, 16, 32, 64
CACHE_BYTES = 4 << 30  # of keys and values; a constant, so that a seed means the same text everywhere


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    *,
    start: int,
    windows: int,
    context: int,
    seed: int,
    stream: int,
    progress: Progress | None = None,
) -> Int64[Tensor, "windows context"]:
    """Windows of the start token followed by `context` − 1 tokens sampled from the model.

    Every token is drawn from the model's whole distribution at temperature 1. The end-of-text token
    is drawn like any other and does not stop a window: forbidding it would make the text one that
    the model does not write, and the loss difference no longer an unbiased estimate of the KL.

    Args:
        start: the first token of each window.
        seed: of the sampling; the global random state is left as it was.
        stream: windows of another stream are drawn independently under the same seed.
        progress: told the tokens sampled so far.
    """
    batch = min(MAX_BATCH, max(1, CACHE_BYTES // _cache_bytes_per_window(model, context)))
    devices = [model.device] if model.device.type == "cuda" else []
    parts = []
    with torch.random.fork_rng(devices=devices), _plain_sampling(model, start):
        torch.manual_seed(_derived_seed(seed, stream))
        for first in range(0, windows, batch):
            prompt = torch.full((min(batch, windows - first), 1), start, device=model.device)
            report = _Report(progress, first * (context - 1), windows * (context - 1), len(prompt))
            tokens = cast(Any, model).generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=context - 1,
                stopping_criteria=StoppingCriteriaList([report]),
            )
            parts.append(tokens.cpu())
    return torch.cat(parts)


def start_token(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> int:
    """The token that a document starts from: BOS, else EOS; the tokenizer's, else the model's.

    Raises:
        CorpusError: neither the tokenizer nor the model's config has one.
    """
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        for owner in (tokenizer, config):
            token = getattr(owner, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int) and 0 <= token < config.vocab_size:
                return token
    raise CorpusError(
        "`self` needs a start token, but the model has neither a BOS nor an EOS; name a text FILE"
    )


class _Report(StoppingCriteria):
    """Tells how many tokens there are after each step of `generate`; never stops it."""

    def __init__(self, progress: Progress | None, before: int, total: int, batch: int):
        self._progress, self._done, self._total, self._batch = progress, before, total, batch

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - its type is the CPU's only
        self, input_ids: Int64[Tensor, "batch tokens"], scores: object, **kwargs: object
    ) -> Bool[Tensor, "batch"]:
        self._done += self._batch
        if self._progress is not None:
            self._progress(self._done, self._total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_sampling(model: PreTrainedModel, start: int) -> Iterator[None]:
    """Replace the model's generation settings, then put them back.

    `generate` fills what its own settings leave at None, an absent EOS included, from the model's,
    and those may truncate or penalise (Qwen's do); so they must go, not be overridden.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, bos_token_id=start, pad_token_id=start
    )
    try:
        yield
    finally:
        model.generation_config = own


def _cache_bytes_per_window(model: PreTrainedModel, context: int) -> int:
    """Keys and values of one window, without regard to what a sliding or compressed cache saves."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    bytes_each = torch.finfo(model.dtype).bits // 8
    return 2 * config.num_hidden_layers * kv_heads * head_dim * context * bytes_each


def _derived_seed(seed: int, stream: int) -> int:
    """A seed that no other pair of seed and stream shares."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little") >> 1
