"""Answering a prompt with a model, compressed or not."""

import math
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.calibration.windows import check_fit
from pbsp.errors import ConfigError, ModelError
from pbsp.models.quiet import quiet_libraries


@dataclass(frozen=True)
class Answer:
    """What a model said: the new text alone, and its length in tokens."""

    text: str
    tokens: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    *,
    raw: bool = False,
    max_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answer:
    """Answer `prompt`, through the tokenizer's chat template if it has one and `raw` is not set.

    Args:
        raw: continue the prompt as it is.
        max_tokens: the longest answer; one also ends where the model has no further positions.
        temperature: 0 takes the likeliest token each time; else sampled from the whole distribution.
        seed: of the sampling; the caller's random state is left as it was.

    Raises:
        ModelError: the model has no tokenizer, or its chat template fails.
        ConfigError: a number is out of range, there is nothing to continue, or no room for an answer.
        CorpusError: the tokenizer has tokens that the model does not know.
    """
    check_request(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if tokenizer is None:
        raise ModelError("the model has no tokenizer, so it cannot read a prompt")
    tokens = _prompt_tokens(tokenizer, prompt, raw=raw)
    if not tokens:
        raise ConfigError("the prompt is empty, and without a chat template there is nothing to continue")
    room = _room(model, tokens)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids = torch.tensor([tokens], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), quiet_libraries():
        torch.manual_seed(seed)
        output = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_tokens, room),
            pad_token_id=pad,
            **sampling,
        )
    new = output[0, len(tokens) :].tolist()
    return Answer(str(tokenizer.decode(new, skip_special_tokens=True)), len(new))


def check_request(*, max_tokens: int, temperature: float, seed: int) -> None:
    """Raise ConfigError for a number that is out of range; needs no model."""
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}; it must be 0 or a positive number")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be between 0 and 2^63 − 1")


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> list[int]:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, verbose=False).input_ids
    turn = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ModelError(f"the model's chat template fails: {error}; --raw goes without it") from None
    return tokenizer(str(text), add_special_tokens=False, verbose=False).input_ids


def _room(model: PreTrainedModel, tokens: list[int]) -> int:
    """How many tokens an answer to these can have; no limit is told by a very large number."""
    check_fit(model, 0, max(tokens))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = sys.maxsize if positions is None else positions - len(tokens)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(tokens)} tokens and the model {positions} positions, so there is no room "
            "for an answer; shorten the prompt"
        )
    return room
