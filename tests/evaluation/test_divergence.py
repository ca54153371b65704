import math

import pytest
import torch

from pbsp.evaluation import divergence
from pbsp.evaluation.divergence import same_top_token, token_divergence, token_losses
from pbsp.evaluation.result import Estimate


def logits(seed, positions=11, vocabulary=50):
    return 3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_bytes", [1, 6 * 4 * 50 * 4, 6 * 4 * 50 * 11, 64 << 20])
def test_chunks_do_not_change_the_divergence(monkeypatch, chunk_bytes):
    monkeypatch.setattr(divergence, "CHUNK_BYTES", chunk_bytes)
    original, model = logits(0), logits(1)
    p, q = original.double().softmax(-1), model.double().softmax(-1)
    kl = token_divergence(original, model)
    torch.testing.assert_close(kl.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(same_top_token(original, model), original.argmax(-1) == model.argmax(-1))
    targets = torch.arange(11)
    torch.testing.assert_close(
        token_losses(model, targets).double(), -q[targets, targets].log(), rtol=1e-5, atol=1e-6
    )


def test_16_bit_logits_are_compared_in_float32():
    original, model = logits(0).bfloat16(), logits(1).bfloat16()
    kl = token_divergence(original, model)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, token_divergence(original.float(), model.float()))


def test_vocabulary_larger_than_a_chunk_still_works(monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 16)
    assert token_divergence(logits(0), logits(0)).abs().max() == 0


def test_estimate_gives_the_standard_error_of_the_mean():
    estimate = Estimate.of([1.0, 2.0, 3.0, 6.0])
    assert estimate.mean == 3.0
    assert estimate.stderr == pytest.approx(math.sqrt(14 / 3 / 4))
    assert Estimate.of([2.0]) == Estimate(2.0, None)
