import copy

import pytest
import torch

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.errors import CorpusError
from pbsp.evaluation.divergence import token_divergence
from pbsp.packed_linear import PackedLinear
from pbsp.recovery.divergence import _kept_bytes
from pbsp.recovery.divergence import divergence as model_divergence
from pbsp.recovery.model import MODEL_TUNING, rate_for, recover_model
from pbsp.recovery.tunable import Tuning
from pbsp.recovery.tuning_file import TuningFile
from pbsp.unfinished import Unfinished
from tiny import tiny_model, tiny_tokens


def windows(count=33, context=32):
    return Windows(tiny_tokens(count, context), text="random", split="test", text_digest="0")


def pair(name="llama", **settings):
    """A compressed model and its original."""
    original = tiny_model(name)
    model = copy.deepcopy(original)
    settings = settings if "method" in settings else {"pattern": "2:8", **settings}
    pbsp.compress(model, None, Config(**settings), corpus=windows(4))
    return torch.nn.Module.float(model), original  # what is not packed was cast to 16 bits


@pytest.fixture
def small_steps(monkeypatch):
    """Two windows a step, judged every three steps."""
    monkeypatch.setattr("pbsp.recovery.model.TOKENS_A_STEP", 64)
    monkeypatch.setattr("pbsp.recovery.model.TOKENS_A_JUDGEMENT", 3 * 64)


def divergence(original, model, tokens):
    with torch.no_grad():
        found = [token_divergence(original(w[None]).logits[0], model(w[None]).logits[0]) for w in tokens]
    return float(torch.stack(found).mean())


def packed_bytes(model):
    return {
        f"{name}.{suffix}": tensor.nbytes
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for suffix, tensor in module.packed.tensors().items()
    }


@pytest.mark.parametrize(
    ("name", "embeddings", "code_rate"),
    [
        ("llama", "16", 0.0),
        ("llama-untied", "8", 1e-2),
        ("qwen2", "16", 1e-2),
        pytest.param("llama", "16", 1e-2, marks=pytest.mark.slow),
        pytest.param("llama-untied", "8", 0.0, marks=pytest.mark.slow),
        pytest.param("qwen2", "16", 0.0, marks=pytest.mark.slow),
    ],
)
def test_distillation_brings_held_out_predictions_nearer(name, embeddings, code_rate, small_steps):
    model, original = pair(name, embeddings=embeddings)
    tokens, sizes = windows().tokens, packed_bytes(model)
    before = divergence(original, model, tokens[-2:])
    found = recover_model(model, original, tokens, Tuning(3, 1e-2, code_rate))
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(divergence(original, model, tokens[-2:]), rel=1e-4)
    assert found.after < 0.9 * found.before
    assert (found.steps, found.tokens, found.held_out_tokens) == (48, 31 * 32, 2 * 32)
    assert [step for step, _, _ in found.curve] == [*range(3, 49, 3)]
    assert min(held for _, _, held in found.curve) == found.after
    assert packed_bytes(model) == sizes
    assert all(parameter.grad is None for parameter in [*original.parameters(), *model.parameters()])


def test_the_rate_is_less_for_models_that_are_near_the_original(small_steps, monkeypatch):
    assert rate_for(10.0) == rate_for(2.5) == 1e-2
    assert rate_for(0.5) == 2e-3
    assert rate_for(0.0) == rate_for(0.1) == 5e-4
    model, original = pair()
    tokens = windows().tokens
    first = divergence(original, model, tokens[-2:-1])
    monkeypatch.setattr("pbsp.recovery.model._RATE_OF_DIVERGENCE", 2e-3 / first)
    found = recover_model(model, original, tokens, MODEL_TUNING)
    assert found.rate == pytest.approx(2e-3, rel=1e-4)
    assert found.after < found.before


def test_products_in_bfloat16_win_as_much_in_float32(small_steps, matrix_instructions):
    model, original = pair()
    tokens = windows().tokens
    before, quick = divergence(original, model, tokens[-2:]), copy.deepcopy(model)
    recover_model(model, original, tokens, Tuning(3, 1e-2, 1e-2))
    matrix_instructions(True)
    found = recover_model(quick, original, tokens, Tuning(3, 1e-2, 1e-2))
    exact, after = (divergence(original, one, tokens[-2:]) for one in (model, quick))
    assert found.after == pytest.approx(after, rel=0.02)
    assert before - after > 0.75 * (before - exact) > 0


@pytest.mark.parametrize("code_rate", [0.0, 1e-2])
def test_other_layouts_are_tuned_too(code_rate, small_steps):
    model, original = pair(method="nanoquant", options={"bits": 1.5, "iterations": 20})
    sizes = packed_bytes(model)
    found = recover_model(model, original, windows().tokens, Tuning(2, 1e-2, code_rate))
    assert found.after < 0.95 * found.before
    assert packed_bytes(model) == sizes


def test_distillation_never_ends_worse(small_steps):
    model, original = pair()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = recover_model(model, original, windows(5).tokens, Tuning(1, 0.9, 0.9))
    assert found.after == found.before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_gradients_through_checkpoints_are_those_of_the_whole_model(small_steps, monkeypatch):
    results, again = {}, []
    once = pbsp.recovery.divergence._again
    monkeypatch.setattr("pbsp.recovery.divergence._again", lambda *a, **k: again.append(1) or once(*a, **k))
    for most in (0, 1 << 30):
        monkeypatch.setattr("pbsp.recovery.divergence.MOST_KEPT", most)
        again.clear()
        model, original = pair("qwen2")
        recover_model(model, original, windows(9).tokens, Tuning(1, 1e-2, 0.0))
        results[bool(again)] = divergence(original, model, windows(9).tokens)
    assert results[True] == pytest.approx(results[False], rel=1e-6)


def test_what_a_way_forward_keeps_grows_with_its_tokens_and_not_with_weights():
    model, original = pair()
    tokens = torch.arange(1, 65)
    kept = [
        _kept_bytes(model, lambda length=length: model_divergence(model, original, tokens[:length]))
        for length in (16, 32, 64)
    ]
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    assert kept[0] > 16 * 4 * width * blocks
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.1)
    assert kept[0] < 0.3 * kept[2]


class Stopped(Exception):  # noqa: N818
    """Stands for a crash."""


@pytest.mark.parametrize(("name", "code_rate"), [("llama", 0.0), ("llama", 1e-2), ("gpt2", 1e-2)])
def test_an_interrupted_distillation_ends_the_same(name, code_rate, tmp_path, small_steps):
    def stop(done, total):
        if done == 7:
            raise Stopped

    tuning, tokens = Tuning(1, 1e-2, code_rate), windows(21).tokens
    whole, original = pair(name)
    expected = recover_model(whole, original, tokens, tuning)
    model, _ = pair(name)
    kept = TuningFile(tmp_path / "tuning.pt")
    with pytest.raises(Stopped):
        recover_model(model, original, tokens, tuning, kept=kept, progress=stop)
    model, _ = pair(name)
    steps = []
    found = recover_model(
        model, original, tokens, tuning, kept=kept, progress=lambda done, total: steps.append(done)
    )
    assert steps[0] == 6
    assert found == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_one_window_is_too_few():
    model, original = pair()
    with pytest.raises(CorpusError, match="at least 2"):
        recover_model(model, original, windows(1).tokens, Tuning(1, 1e-2, 0.0))


@pytest.mark.parametrize("recover", ["model", "both"])
def test_compress_tunes_the_model_at_the_end_and_resumes(recover, tmp_path, small_steps):
    def compressed(out, **options):
        model = tiny_model("llama")
        config = Config(pattern="2:8", recover=recover)
        report = pbsp.compress(model, None, config, corpus=windows(21), **options)
        pbsp.save_compressed(model, None, tmp_path / out, report)
        return report, (tmp_path / out / "model.safetensors").read_bytes()

    def stop(stage, done, total):
        if stage == "tune" and done == 7:
            raise Stopped

    report, whole = compressed("whole")
    assert report.distilled is not None
    assert report.distilled.after < report.distilled.before
    assert len(report.recovered) == (2 if recover == "both" else 0)
    with pytest.raises(Stopped):
        compressed("stopped", progress=stop, unfinished=Unfinished(tmp_path / "kept"))
    again, resumed = compressed("resumed", unfinished=Unfinished(tmp_path / "kept"))
    assert resumed == whole
    assert again.distilled == report.distilled
