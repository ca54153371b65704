"""Answering a prompt with a model, compressed or not."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.errors import ConfigError, ModelError


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
        max_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time; else sampled from the whole distribution.
        seed: of the sampling; the caller's random state is left as it was.

    Raises:
        ModelError: the model has no tokenizer.
        ConfigError: a number is out of range, or there is nothing to continue.
    """
    if tokenizer is None:
        raise ModelError("the model has no tokenizer, so it cannot read a prompt")
    if max_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"max_tokens {max_tokens} must be at least 1, and temperature {temperature} at least 0"
        )
    if tokenizer.chat_template and not raw:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise ConfigError("the prompt is empty, and without a chat template there is nothing to continue")
    inputs = inputs.to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **sampling,
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    return Answer(tokenizer.decode(new, skip_special_tokens=True), len(new))
