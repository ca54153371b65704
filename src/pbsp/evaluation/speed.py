"""How fast a model reads a prompt and writes, and how near it comes to the speed of memory."""

import contextlib
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pbsp.calibration.windows import check_fit
from pbsp.errors import ConfigError
from pbsp.resources import peak_rss_bytes

_SEED = 0


@dataclass(frozen=True)
class Speed:
    """What was measured of one model; times are medians.

    Attributes:
        dtype: of the model's floating-point weights.
        prompt_tokens_per_second: of one prompt of `prompt_tokens`, first token included.
        decode_tokens_per_second: of the `new_tokens` after it, one at a time.
        first_token_seconds: from the prompt to the first token.
        model_bytes: of all parameters and buffers in memory.
        bytes_per_token: of the weights that one decoded token reads: all but the rows of the embedding that
            other tokens have. The cache of keys and values comes on top.
        bandwidth_share: bytes_per_token · decode_tokens_per_second as a share of the memory's speed.
        peak_bytes: the largest resident memory while it ran, libraries and all.
    """

    dtype: str
    prompt_tokens: int
    new_tokens: int
    runs: int
    threads: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    model_bytes: int
    bytes_per_token: int
    bandwidth_share: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return asdict(self)


def check_sizes(*, prompt_tokens: int, new_tokens: int, runs: int) -> None:
    """Raise ConfigError for a number that is out of range; needs no model."""
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("runs", runs)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel, *, bandwidth: float, prompt_tokens: int = 512, new_tokens: int = 64, runs: int = 3
) -> Speed:
    """Time random prompts and greedy tokens behind them; nothing stops at an end token.

    Args:
        model: in evaluation mode.
        bandwidth: bytes per second that the machine reads, see `kernels.bandwidth`.
        prompt_tokens: length of the prompt.
        new_tokens: tokens after the first.
        runs: repetitions, behind one that is not counted.

    Raises:
        ConfigError: a number is out of range, or the model has too few positions.
    """
    check_sizes(prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs)
    check_fit(model, prompt_tokens + new_tokens + 1, 0)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(_SEED)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    gc.collect()
    _forget_peak()
    _run(model, prompt[:, : min(prompt_tokens, 8)], 2)
    first: list[float] = []
    rest: list[float] = []
    for _ in range(runs):
        prompt_seconds, token_seconds = _run(model, prompt, new_tokens)
        first.append(prompt_seconds)
        rest += token_seconds
    read = token_bytes(model)
    first_token = statistics.median(first)
    per_second = 1 / statistics.median(rest)
    return Speed(
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        threads=torch.get_num_threads(),
        prompt_tokens_per_second=prompt_tokens / first_token,
        decode_tokens_per_second=per_second,
        first_token_seconds=first_token,
        model_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        bytes_per_token=read,
        bandwidth_share=read * per_second / bandwidth,
        peak_bytes=peak_rss_bytes(),
    )


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a token reads: those of every module but the embeddings, which give one row.

    A head that shares its matrix with the embedding is a module of its own and counts.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            total += cast(torch.Tensor, module.weight)[0].nbytes
        else:
            held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            total += sum(tensor.nbytes for tensor in held)
    return total


def _run(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and of each of those behind it."""
    supported = getattr(model, "_supports_logits_to_keep", bool)()
    options: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if supported else {})}
    times = []
    tokens, cache = prompt, None
    for _ in range(new_tokens + 1):
        start = time.perf_counter()
        output = model(input_ids=tokens, cache=cache, **options)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.cache
        tokens.tolist()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return times[0], times[1:]


def _forget_peak() -> None:
    """Let the system measure the peak memory anew, where it can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
