"""Perplexity of models on token windows, and their divergence from an original, in one pass over the text."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.calibration.windows import Windows, check_fit
from pbsp.errors import ConfigError, ModelError
from pbsp.evaluation.divergence import same_top_token, token_divergence, token_losses
from pbsp.evaluation.result import Estimate, Evaluation, perplexity_of

Progress = Callable[[int, int], None]
"""Called with the forward passes done and the passes in all."""


@runtime_checkable
class Predictions(Protocol):
    """What the original predicted on the windows, where that need not be found by running it.

    Attributes:
        vocabulary: tokens that it knows.
        losses: the mean loss of every window.
    """

    vocabulary: int
    losses: Sequence[float]

    def logits(self, windows: slice) -> Float[Tensor, "windows context vocabulary"]:
        """The logits at all positions of these windows."""
        ...


def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    *,
    original: PreTrainedModel | Predictions | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """The model's perplexity on the windows and, given the original, its divergence from it.

    See `evaluate_all`.
    """
    return evaluate_all({"model": model}, windows, original=original, batch=batch, progress=progress)["model"]


def mean_loss(model: PreTrainedModel, tokens: Int64[Tensor, "windows context"]) -> float:
    """Nats per token on these windows."""
    total = 0.0
    for window in tokens.to(model.device):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        total += float(token_losses(logits, window[1:]).mean())
    return total / len(tokens)


@torch.no_grad()
def evaluate_all(
    models: Mapping[str, PreTrainedModel],
    windows: Windows,
    *,
    original: PreTrainedModel | Predictions | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Evaluate several models on the same windows; the original runs once per window for all of them.

    Args:
        models: by the name to report them under; the original itself may be one of them, and is
            then not run twice.
        windows: from `evaluation_windows`.
        original: what to measure the divergence from; on any device. Given as `Predictions`, on these
            windows, it does not run.
        batch: windows per forward pass. The logits of one are context × vocabulary × 4 bytes.
        progress: told the forward passes done.

    Raises:
        ModelError: the vocabularies differ, or a model's outputs are not finite.
        CorpusError: a model has too few positions for the context, or no embedding for a token.
    """
    if batch < 1:
        raise ConfigError(f"a batch of {batch} windows; at least 1 is needed")
    runs = {name: model for name, model in models.items() if model is not original}
    _check(runs, windows, original)
    scores = {name: _Scores(name) for name in runs}
    reference = _Scores("the original")
    running = [*runs.values(), *([original] if isinstance(original, PreTrainedModel) else [])]
    tell = _counter(progress, -(-len(windows) // batch) * len(running))
    with _evaluating(running):
        for first in range(0, len(windows), batch):
            tokens = windows.tokens[first : first + batch]
            targets = tokens[:, windows.scored_from + 1 :]
            original_logits = None
            if isinstance(original, PreTrainedModel):
                original_logits = _logits(original, tokens, windows.scored_from)
                reference.add(original_logits, targets)
                tell()
            elif original is not None:
                chosen = slice(first, first + len(tokens))
                original_logits = original.logits(chosen)[:, windows.scored_from : -1]
                reference.losses += original.losses[chosen]
            for name, model in runs.items():
                scores[name].add(_logits(model, tokens, windows.scored_from), targets, original_logits)
                tell()
    return {
        name: (scores[name] if name in runs else reference.against_itself()).evaluation(
            model, windows, None if original is None else reference
        )
        for name, model in models.items()
    }


@dataclass
class _Scores:
    """Means per window, gathered window by window."""

    name: str
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def add(
        self,
        logits: Float[Tensor, "windows positions vocabulary"],
        targets: Int64[Tensor, "windows positions"],
        original: Float[Tensor, "windows positions vocabulary"] | None = None,
    ) -> None:
        """The next windows' means; with the original's logits also those of the divergence from it."""
        for index, wanted in enumerate(targets):
            losses = token_losses(logits[index], wanted.to(logits.device))
            self.losses.append(self._mean("loss", losses))
            if original is not None:
                divergence = token_divergence(original[index], logits[index])
                agreement = same_top_token(original[index], logits[index])
                self.divergences.append(self._mean("KL to the original", divergence))
                self.agreements.append(self._mean("agreement", agreement))

    def _mean(self, quantity: str, values: Tensor) -> float:
        mean = float(values.double().mean())
        if not math.isfinite(mean):
            window = max(len(self.losses), len(self.divergences) + 1)
            raise ModelError(
                f"{self.name}: the {quantity} of window {window} is {mean}: its outputs are not finite; "
                "try dtype float32 or bfloat16"
            )
        return mean

    def against_itself(self) -> "_Scores":
        count = len(self.losses)
        return _Scores(self.name, self.losses, [0.0] * count, [1.0] * count)

    def evaluation(self, model: PreTrainedModel, windows: Windows, reference: "_Scores | None") -> Evaluation:
        divergence: dict[str, Any] = {}
        if reference is not None:
            pairs = zip(self.losses, reference.losses, strict=True)
            divergence = {
                "original_perplexity": perplexity_of(Estimate.of(reference.losses).mean),
                "loss_difference": Estimate.of([ours - theirs for ours, theirs in pairs]),
                "kl": Estimate.of(self.divergences),
                "top1": Estimate.of(self.agreements),
            }
        return Evaluation(
            loss=Estimate.of(self.losses),
            tokens=len(windows) * (windows.context - 1 - windows.scored_from),
            windows=len(windows),
            context=windows.context,
            text=windows.text,
            split=windows.split,
            digest=windows.digest,
            seed=windows.seed,
            note=windows.note,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            threads=torch.get_num_threads(),
            window_losses=tuple(self.losses),
            **divergence,
        )


def _logits(
    model: PreTrainedModel, tokens: Int64[Tensor, "windows context"], scored_from: int
) -> Float[Tensor, "windows positions vocabulary"]:
    """The predictions of the scored targets: each is made at the position before it."""
    return model(input_ids=tokens.to(model.device), use_cache=False).logits[:, scored_from:-1]


def _check(
    models: Mapping[str, PreTrainedModel], windows: Windows, original: PreTrainedModel | Predictions | None
) -> None:
    largest = int(windows.tokens.max())
    for model in [*models.values(), *([original] if isinstance(original, PreTrainedModel) else [])]:
        check_fit(model, windows.context, largest)
    if original is None:
        return
    expected = _vocabulary(original) if isinstance(original, PreTrainedModel) else original.vocabulary
    for name, model in models.items():
        if _vocabulary(model) != expected:
            raise ModelError(
                f"{name} has a vocabulary of {_vocabulary(model)} tokens and the original one of {expected}; "
                "their divergence is not defined, so name the model that it was made from"
            )


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


@contextmanager
def _evaluating(models: list[PreTrainedModel]) -> Iterator[None]:
    """No dropout inside; each model's mode is put back."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A call that tells `progress` of one more pass each time."""
    done = itertools.count(1)
    return lambda: progress(next(done), total) if progress is not None else None
