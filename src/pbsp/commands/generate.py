"""What `pbsp generate` does after parsing: load a model and answer."""

import dataclasses

from pbsp.commands.console import print_json
from pbsp.generation import check_request, generate
from pbsp.models.load import load_model


def run_generate(
    source: str,
    prompt: str,
    *,
    raw: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    json: bool,
) -> None:
    """`pbsp generate`."""
    check_request(max_tokens=max_tokens, temperature=temperature, seed=seed)
    loaded = load_model(source, device=device)
    answer = generate(
        loaded.model,
        loaded.tokenizer,
        prompt,
        raw=raw,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    if json:
        print_json({"model": source, "prompt": prompt, **dataclasses.asdict(answer)})
    else:
        print(answer.text)
