"""Distillation: tune a compressed model until it predicts what the original predicts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.errors import CorpusError
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.products import quick_products
from pbsp.recovery.divergence import divergence, little_kept
from pbsp.recovery.tunable import Tunable, Tuning, tunable
from pbsp.recovery.tuning_file import TuningFile

MODEL_TUNING = Tuning(epochs=1, rate=None, code_rate=0.0)
TOKENS_A_STEP = 512
TOKENS_A_JUDGEMENT = 20_480
_HELD_OUT = 16  # one window in so many, the last ones, judges and is not trained on;
_MOST_HELD_OUT = 8  # that is often enough to tell states apart
_RATE_OF_DIVERGENCE = 4e-3  # of a scale, for a nat per token: measured, see docs/experiments.md
_RATES = (5e-4, 1e-2)  # the least and the most


@dataclass(frozen=True)
class ModelRecovery:
    """What tuning a model did.

    Attributes:
        before, after: KL(original ‖ model) in nats per token, a mean over the held-out windows.
        rate: the largest step of scales, see `Tuning`; None in reports that do not say.
        steps: updates made; those after the best state are not kept.
        tokens: that were trained on, repetitions not counted.
        held_out_tokens: that judged.
        curve: (step, mean KL of the training windows since the last, KL of the held-out ones).
    """

    before: float
    after: float
    rate: float | None
    steps: int
    tokens: int
    held_out_tokens: int
    curve: tuple[tuple[int, float, float], ...]


@dataclass
class _Course:
    """How far a tuning has come, beside its parameters."""

    before: float
    best: float
    step: int = 0
    seen: list[float] = field(default_factory=list)  # KL of the training windows since the last judgement
    curve: list[tuple[int, float, float]] = field(default_factory=list)


@torch.no_grad()
def recover_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Int64[Tensor, "windows context"],
    tuning: Tuning,
    *,
    progress: Callable[[int, int], None] | None = None,
    kept: TuningFile | None = None,
) -> ModelRecovery:
    """Tune all packed layers, norms and biases of `model` in place; it never ends worse than it began.

    The loss is KL(teacher ‖ model), a mean over tokens; the teacher's predictions are computed as they are
    needed. Windows come in order, 512 tokens or one window a step, one at a time through the model. Held in
    memory are both models' weights in the dtype they compute in, the gradient of the one, one window's
    logits, and what its way back needs: at most 2 GiB, and where that is too little its hidden states before
    every block, which is then computed again; and for every code that is tuned 16 bytes, of which the best
    state so far takes 4.

    Args:
        model: compressed, in evaluation mode.
        teacher: the original, on the same device.
        tokens: calibration windows; one in 16, the last ones, at most 8, is held out.
        tuning: see `Tuning`; without a rate, `rate_for` the first held-out window's divergence.
        progress: told the steps done, and all.
        kept: where the state is kept every 20,480 tokens, and found; the result is the same.

    Raises:
        CorpusError: there are fewer than two windows.
        CalibrationError: the divergence is not finite.
    """
    if len(tokens) < 2:
        raise CorpusError(f"{len(tokens)} windows; distillation needs at least 2, one of them held out")
    held = min(max(1, len(tokens) // _HELD_OUT), _MOST_HELD_OUT)
    judged = tokens[-held:]
    windows_a_step = max(1, TOKENS_A_STEP // tokens.shape[1])
    batches = tokens[:-held].split(windows_a_step)
    judged_every = max(1, TOKENS_A_JUDGEMENT // (windows_a_step * tokens.shape[1]))  # steps
    steps = tuning.epochs * len(batches)
    blocks = [model.get_submodule(block.name) for block in decoder_blocks(teacher)]

    def held_out() -> float:
        return sum(float(_divergence(model, teacher, window)) for window in judged) / held

    rate = tuning.rate
    if rate is None:
        rate = rate_for(float(_divergence(model, teacher, judged[0])))
    originals = _weights(teacher)
    with (
        tunable(model, replace(tuning, rate=rate), steps=steps, originals=originals) as chosen,
        little_kept(model, blocks, lambda: _divergence(model, teacher, judged[0])),
    ):
        found = kept.load(model.device) if kept else None
        if found:
            course, best = _resumed(found, chosen)
        else:
            first = held_out()
            course, best = _Course(first, first), chosen.values()
        while course.step < steps:
            if progress:
                progress(course.step, steps)
            course.seen.append(_step(model, teacher, batches[course.step % len(batches)], chosen))
            course.step += 1
            if course.step % judged_every and course.step < steps:
                continue
            now = held_out()
            course.curve.append((course.step, sum(course.seen) / len(course.seen), now))
            course.seen = []
            if now < course.best:
                course.best, best = now, chosen.values()
            if kept:
                kept.save({"course": asdict(course), "best": best, "tuned": chosen.state()})
        chosen.restore(best)
    return ModelRecovery(
        before=course.before,
        after=course.best,
        rate=rate,
        steps=steps,
        tokens=tokens[:-held].numel(),
        held_out_tokens=judged.numel(),
        curve=tuple(course.curve),
    )


def rate_for(divergence: float) -> float:
    """The largest step of scales for a model that is so far from the original, in nats per token.

    Steps of many scales at once add up to noise in the weights, which must stay below the errors that
    compression left: what is right at one bit per weight undoes more than it wins at 2.5.
    """
    least, most = _RATES
    return min(max(_RATE_OF_DIVERGENCE * divergence, least), most)


def _resumed(found: dict[str, Any], chosen: Tunable) -> tuple[_Course, list[Tensor]]:
    chosen.load_state(found["tuned"])
    return _Course(**found["course"]), found["best"]


def _weights(teacher: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the linears in the teacher's blocks, by full name."""
    return {
        name: linear_weight(module)
        for block in decoder_blocks(teacher)
        for name, module in block.linears().items()
    }


def _divergence(model: PreTrainedModel, teacher: PreTrainedModel, window: Tensor) -> Tensor:
    with quick_products(model.dtype, model.device):
        return divergence(model, teacher, window)


def _step(model: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, chosen: Tunable) -> float:
    """One update; the windows' mean KL before it."""
    total = 0.0
    for window in windows:
        with torch.enable_grad():
            loss = _divergence(model, teacher, window) / len(windows)
            loss.backward(inputs=chosen.leaves())
        total += float(loss.detach())
    chosen.step()
    return total
