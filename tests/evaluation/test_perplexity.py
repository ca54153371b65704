import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

from oracles import losses_and_divergence
from pbsp.calibration.corpus import evaluation_windows
from pbsp.calibration.windows import Windows
from pbsp.errors import ConfigError, CorpusError, ModelError
from pbsp.evaluation.perplexity import evaluate, evaluate_all
from pbsp.evaluation.report import evaluation_table
from pbsp.resources import peak_rss_bytes
from tiny import CONFIGS, tiny_model, tiny_tokens


def windows_of(tokens, **changes):
    return Windows(tokens, text="random", split="none", text_digest="0", **changes)


def nudged(model_seed=0, size=0.3):
    """The tiny model with noise on its weights."""
    model = tiny_model(seed=model_seed)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data += size * parameter.std() * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_divergence_equal_those_of_every_prefix(name):
    model, original = tiny_model(name), tiny_model(name, seed=1)
    tokens = tiny_tokens(2, 9)
    found = evaluate(model, windows_of(tokens), original=original)
    loss, kl, top1 = torch.tensor([losses_and_divergence(model, original, row) for row in tokens]).mean(0)
    assert found.loss.mean == pytest.approx(float(loss), rel=1e-5)
    assert found.kl.mean == pytest.approx(float(kl), rel=1e-3)
    assert found.top1.mean == pytest.approx(float(top1))
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert found.tokens == 16


def test_standard_errors_are_those_of_the_window_means():
    model, original = nudged(), tiny_model()
    tokens = tiny_tokens(6, 20)
    found = evaluate(model, windows_of(tokens), original=original)
    alone = [evaluate(model, windows_of(row[None]), original=original) for row in tokens]
    for name in ("loss", "loss_difference", "kl", "top1"):
        values = torch.tensor([getattr(one, name).mean for one in alone], dtype=torch.float64)
        assert getattr(found, name).mean == pytest.approx(float(values.mean()), abs=1e-6)
        assert getattr(found, name).stderr == pytest.approx(float(values.std() / math.sqrt(6)), abs=1e-6)
    assert found.stderr == pytest.approx(found.perplexity * found.loss.stderr)
    assert alone[0].stderr is None


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_batch_size_does_not_change_the_result(batch):
    found = evaluate(nudged(), windows_of(tiny_tokens(5)), original=tiny_model(), batch=batch)
    alone = evaluate(nudged(), windows_of(tiny_tokens(5)), original=tiny_model())
    assert found.loss.mean == pytest.approx(alone.loss.mean, rel=1e-6)
    assert found.kl.mean == pytest.approx(alone.kl.mean, rel=1e-4)


def test_several_models_share_one_pass_of_the_original():
    original, calls, seen = tiny_model(), [], []
    original.register_forward_hook(lambda *_: calls.append(1))
    models = {"near": nudged(size=0.1), "far": nudged(size=0.5), "original": original}
    found = evaluate_all(
        models,
        windows_of(tiny_tokens(3)),
        original=original,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(calls) == 3
    assert seen == [(step, 9) for step in range(1, 10)]
    assert list(found) == list(models)
    assert found["near"].kl.mean < found["far"].kl.mean
    assert found["original"].kl.mean == found["original"].loss_difference.mean == 0
    assert found["original"].top1.mean == 1
    assert found["near"].original_perplexity == found["original"].perplexity
    near = evaluate(models["near"], windows_of(tiny_tokens(3)), original=original)
    assert near == found["near"]


def test_equal_models_do_not_diverge():
    found = evaluate(tiny_model(), windows_of(tiny_tokens()), original=tiny_model())
    assert (found.kl.mean, found.loss_difference.mean, found.top1.mean) == (0, 0, 1)


def test_loss_difference_on_sampled_text_estimates_the_kl():
    original, model = tiny_model(), nudged(size=1.0)
    for each in (original, model):
        each.get_output_embeddings().weight.data *= 8  # predictions worth diverging from
    windows = evaluation_windows("self", None, original, context=64, windows=200)
    found = evaluate(model, windows, original=original, batch=50)
    error = found.loss_difference.stderr + found.kl.stderr
    assert found.kl.mean > 10 * found.kl.stderr
    assert abs(found.loss_difference.mean - found.kl.mean) < 4 * error
    assert found.loss_difference.stderr < 0.1 * found.kl.mean


def test_only_targets_after_scored_from_count():
    tokens = tiny_tokens(2, 12)
    found = evaluate(tiny_model(), windows_of(tokens, scored_from=4))
    with torch.no_grad():
        logits = tiny_model()(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
    assert found.loss.mean == pytest.approx(float(expected), rel=1e-5)
    assert found.tokens == 14


def test_training_mode_is_ignored_and_put_back():
    model = tiny_model("gpt2").train()  # GPT-2 has dropout
    assert evaluate(model, windows_of(tiny_tokens())) == evaluate(
        tiny_model("gpt2"), windows_of(tiny_tokens())
    )
    assert model.training


def test_another_vocabulary_context_or_token_is_refused():
    small = tiny_model()
    small.config.vocab_size = 200
    with pytest.raises(ModelError, match="200 tokens and the original one of 256"):
        evaluate(small, windows_of(tiny_tokens().clamp(max=100)), original=tiny_model())
    with pytest.raises(CorpusError, match="knows only 200"):
        evaluate(small, windows_of(torch.full((1, 8), 220)))
    with pytest.raises(CorpusError, match="129 tokens do not fit"):
        evaluate(tiny_model(), windows_of(tiny_tokens(1, 129)))
    with pytest.raises(ConfigError, match="batch of 0"):
        evaluate(tiny_model(), windows_of(tiny_tokens()), batch=0)


def test_outputs_that_are_not_finite_are_an_error_that_names_the_model():
    model = tiny_model()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(ModelError, match=r"broken: the loss of window 1 is nan"):
        evaluate_all({"broken": model}, windows_of(tiny_tokens()))


def test_json_says_what_was_measured_on_what():
    found = evaluate(nudged(), windows_of(tiny_tokens(), seed=3, note="3 of 5"), original=tiny_model())
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["text"] == "random"
    assert values["digest"] == windows_of(tiny_tokens()).digest
    assert values["context"] == 32
    assert values["tokens"] == 3 * 31
    assert values["kl"] == found.kl.mean
    assert values["top1_stderr"] == found.top1.stderr
    assert (values["dtype"], values["device"], values["seed"]) == ("float32", "cpu", 3)
    alone = evaluate(nudged(), windows_of(tiny_tokens(1))).to_json()
    assert alone["kl"] is alone["stderr"] is None
    overflown = dataclasses.replace(found, loss=dataclasses.replace(found.loss, mean=1e4))
    assert overflown.to_json()["perplexity"] is None


def test_table_shows_the_text_beside_the_numbers():
    found = evaluate_all({"ours": nudged()}, windows_of(tiny_tokens(), note="3 of 5"), original=tiny_model())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(evaluation_table(found))
    text = console.export_text()
    for part in (
        "ours",
        "original",
        "random (none)",
        "3 windows of 32 tokens, 93 scored",
        "3 of 5",
        "float32 on cpu",
    ):
        assert part in text


def test_peak_memory_is_in_bytes():
    assert 50e6 < peak_rss_bytes() < 1e12
