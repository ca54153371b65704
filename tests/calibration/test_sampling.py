import pytest
import torch
from transformers import GenerationConfig

from pbsp.calibration import sampling
from pbsp.calibration.corpus import corpus, evaluation_windows
from pbsp.calibration.sampling import sample_windows, start_token
from pbsp.errors import CorpusError
from tiny import tiny_model, tiny_tokenizer


def test_windows_are_full_and_start_from_the_bos():
    windows = corpus("self", 5, 16).windows(tiny_tokenizer(), tiny_model())
    assert windows.tokens.shape == (5, 16)
    assert set(windows.tokens[:, 0].tolist()) == {tiny_tokenizer().bos_token_id}
    assert windows.describe()["text"] == "self"


def test_self_needs_no_tokenizer():
    assert corpus("self", 1, 8).windows(None, tiny_model()).tokens[0, 0] == 1


def test_same_seed_gives_the_same_text_and_another_seed_or_stream_another():
    model = tiny_model()
    first = corpus("self", 3, 16).windows(None, model)
    assert first.digest == corpus("self", 3, 16).windows(None, model).digest
    assert first.digest != corpus("self", 3, 16, seed=1).windows(None, model).digest
    evaluated = evaluation_windows("self", None, model, context=16, windows=3)
    assert not {tuple(row) for row in first.tokens.tolist()} & {
        tuple(row) for row in evaluated.tokens.tolist()
    }
    assert not evaluated.were_calibrated_on(first.describe())


def test_random_state_and_generation_settings_are_left_as_they_were():
    model = tiny_model()
    own = model.generation_config
    before = torch.random.get_rng_state()
    corpus("self", 2, 8).windows(None, model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.generation_config is own


def test_tokens_follow_the_whole_distribution_whatever_the_model_suggests():
    model = tiny_model()
    model.generation_config = GenerationConfig(
        top_k=1, temperature=0.1, repetition_penalty=9.0, eos_token_id=list(range(250)), do_sample=True
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(0)
    count = 20_000
    tokens = sample_windows(model, start=1, windows=count, context=2, seed=0, stream=0)[:, 1]
    found = torch.bincount(tokens, minlength=256) / count
    deviation = (found - expected) / (expected * (1 - expected) / count).sqrt()
    assert float(deviation.square().mean()) < 1.4  # mean of 256 squared z-scores: 1 ± 0.09


def test_end_of_text_does_not_end_a_window():
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(256))
    assert corpus("self", 2, 12).windows(None, model).tokens.shape == (2, 12)


def test_progress_ends_at_the_total(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_BATCH", 2)
    seen = []
    corpus("self", 3, 5).windows(None, tiny_model(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    assert seen == sorted(seen)


def test_start_is_the_bos_else_the_eos_of_tokenizer_or_model():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert start_token(tokenizer, model) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert start_token(tokenizer, model) == model.config.bos_token_id
    model.config.bos_token_id = None
    assert start_token(tokenizer, model) == tokenizer.eos_token_id
    model.config.eos_token_id = [7, 8]
    assert start_token(None, model) == 7
    model.config.eos_token_id = None
    with pytest.raises(CorpusError, match="neither a BOS nor an EOS"):
        start_token(None, model)


def test_endless_text_needs_a_number_of_windows():
    with pytest.raises(CorpusError, match="no end"):
        evaluation_windows("self", None, tiny_model(), context=8, windows=None)
