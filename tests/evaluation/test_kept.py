import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from pbsp.calibration.windows import Windows
from pbsp.evaluation.kept import KeptPredictions, keep_predictions
from pbsp.evaluation.perplexity import evaluate
from tiny import CONFIGS, tiny_model, tiny_tokens

WINDOWS = Windows(tiny_tokens(3), text="random", split="none", text_digest="0")


def calls_of(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_divergence_from_kept_predictions_is_that_from_the_model(tmp_path):
    model = tiny_model(seed=1)
    for name in CONFIGS:
        original = tiny_model(name)
        evaluation, kept = keep_predictions(original, WINDOWS, tmp_path / name)
        assert evaluation == evaluate(original, WINDOWS)
        assert (kept is None) == (name == "gemma2"), "its head caps the logits"
        if kept is None:
            continue
        calls = calls_of(original)
        for batch in (1, 2):
            found = evaluate(model, WINDOWS, original=kept, batch=batch)
            assert not calls
            expected = evaluate(model, WINDOWS, original=original, batch=batch)
            assert found.kl.mean == pytest.approx(expected.kl.mean, rel=1e-6), name
            assert dataclasses.replace(found, kl=None) == dataclasses.replace(expected, kl=None), name
            calls.clear()


def test_only_targets_after_scored_from_count(tmp_path):
    windows = Windows(tiny_tokens(2), text="random", split="none", text_digest="0", scored_from=4)
    _, kept = keep_predictions(tiny_model(), windows, tmp_path)
    model = tiny_model(seed=1)
    assert evaluate(model, windows, original=kept) == evaluate(model, windows, original=tiny_model())


def test_kept_predictions_are_read_again_and_made_again_where_a_file_is_lost(tmp_path):
    original = tiny_model()
    first, _ = keep_predictions(original, WINDOWS, tmp_path)
    calls = calls_of(original)
    again, kept = keep_predictions(original, WINDOWS, tmp_path)
    assert not calls
    assert again == first
    assert isinstance(kept, KeptPredictions)
    (tmp_path / "hidden-00001.safetensors").unlink()
    keep_predictions(original, WINDOWS, tmp_path)
    assert len(calls) == 1 + len(WINDOWS)


def test_a_model_that_caps_its_logits_is_not_kept(tmp_path):
    torch.manual_seed(0)
    shared = CONFIGS["gemma3"].to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Gemma2Config(
        **{name: shared[name] for name in names},
        head_dim=16,
        num_key_value_heads=2,
        final_logit_softcapping=0.5,
    )
    original = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    evaluation, kept = keep_predictions(original, WINDOWS, tmp_path)
    assert kept is None
    assert evaluation == evaluate(original, WINDOWS)
    assert not list(tmp_path.glob("hidden-*"))
    calls = calls_of(original)
    assert keep_predictions(original, WINDOWS, tmp_path) == (evaluation, None)
    assert not calls
