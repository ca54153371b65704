import os
from functools import partial

import pytest
import torch

import pbsp
from pbsp import planning
from pbsp.calibration.corpus import Corpus
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.embedding_rounding import head_moment, round_head
from pbsp.errors import ConfigError
from pbsp.evaluation.perplexity import evaluate
from pbsp.file_size import embedding_loss, file_bytes
from pbsp.integrations.embeddings import pack_embeddings
from pbsp.models.blocks import decoder_blocks
from pbsp.planning import make_plan
from pbsp.preview import preview
from tiny import tiny_model, tiny_tokens


def windows():
    return Windows(tiny_tokens(4, 32), text="random", split="test", text_digest="0")


def compressed(name="llama", **settings):
    model = tiny_model(name)
    report = pbsp.compress(model, None, Config(**settings), corpus=windows())
    return model, report


def weight_bytes(folder):
    return os.path.getsize(folder / "model.safetensors")


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.25, 3.0, 6.0])
def test_stored_bits_use_the_budget_and_never_exceed_it(bits):
    _, report = compressed(bits=bits)
    assert bits - 0.15 < report.stored_bits <= bits
    assert report.expected_loss > 0


@pytest.mark.parametrize("name", ["llama", "llama-untied", "opt", "gpt2"])
def test_the_file_is_as_large_as_predicted_and_within_its_budget(name, tmp_path):
    budget = 70_000 if name == "llama-untied" else 55_000
    model, report = compressed(name, file_size=budget)
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    assert budget * 0.97 < weight_bytes(tmp_path / "out") <= budget
    again = tiny_model(name)
    with torch.no_grad():
        planned = make_plan(again, decoder_blocks(again), Config(file_size=budget), windows().tokens)
    found = file_bytes(again, planned.plan, Config(file_size=budget), planned.embedding_bits)
    assert found == weight_bytes(tmp_path / "out")


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_file_of_given_size_has_the_embeddings_that_were_asked_for(bits, tmp_path):
    budget = {16: 75_000, 8: 55_000, 4: 48_000}[bits]
    model, report = compressed(file_size=budget, embeddings=str(bits))
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    assert report.embeddings == f"{bits} bit"
    assert budget * 0.97 < weight_bytes(tmp_path / "out") <= budget


def test_embeddings_get_the_bits_with_the_lower_expected_loss(monkeypatch):
    for loss, chosen in ((1e9, "8 bit"), (-1e9, "4 bit")):
        monkeypatch.setattr("pbsp.planning.embedding_loss", lambda *_, loss=loss: loss)
        assert compressed(file_size=55_000)[1].embeddings == chosen
    assert compressed(file_size=44_000)[1].embeddings == "4 bit", "nothing else fits"


@torch.no_grad()
def test_the_loss_of_embeddings_is_that_of_a_model_with_them():
    model = tiny_model("llama-untied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = embedding_loss(model, windows().tokens, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    before = evaluate(model, windows()).loss.mean
    moment = head_moment(model, lambda: [model(window[None]) for window in windows().tokens])
    pack_embeddings(model, torch.float32, 4, round_head=partial(round_head, moment=moment))
    assert found == pytest.approx(evaluate(model, windows()).loss.mean - before, abs=1e-5)
    assert found != 0


def test_a_saved_plan_replays_to_the_same_bytes(tmp_path):
    model, report = compressed(bits=1.5)
    pbsp.save_compressed(model, None, tmp_path / "first", report)
    plan = pbsp.read_plan(tmp_path / "first" / "plan.toml")
    model, report = compressed(plan=plan)
    pbsp.save_compressed(model, None, tmp_path / "second", report)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_integers_are_planned_where_planes_end_and_replay_from_the_file(tmp_path):
    model, report = compressed(bits=6.0)
    assert {layer.pattern for layer in report.layers} >= {"4 bit", "8 bit"}
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    plan = pbsp.read_plan(tmp_path / "out" / "plan.toml")
    _, again = compressed(plan=plan)
    assert [(layer.pattern, layer.output_error) for layer in again.layers] == [
        (layer.pattern, layer.output_error) for layer in report.layers
    ]
    loaded = pbsp.load_model(str(tmp_path / "out"), dtype=model.dtype).model
    with torch.no_grad():
        found, expected = (each(tiny_tokens()).logits for each in (loaded, model))
    assert torch.equal(found, expected)


def test_layers_that_matter_get_more_bits():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)  # so that down_proj there adds next to nothing
    report = pbsp.compress(model, None, Config(bits=1.5), corpus=windows())
    bits = {layer.name: layer.stored_bits for layer in report.layers}
    assert bits["model.layers.0.mlp.down_proj"] < bits["model.layers.1.mlp.down_proj"]


def test_impossible_budgets_are_refused():
    with pytest.raises(ConfigError, match="below the smallest"):
        compressed(bits=0.3)
    with pytest.raises(ConfigError, match="no plan fits in 100 bytes: the smallest takes"):
        compressed(file_size=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2.0, "pattern": "4:8"}, "bits and pattern each say"),
        ({"bits": 2.0, "file_size": 10}, "bits and file_size each say"),
        ({"plan": {"a": "4:8"}, "allocation": "paper"}, "plan and allocation each say"),
        ({"bits": 2.0, "method": "pbsp"}, "does not go with method pbsp"),
        ({"bits": 0.0}, "bits is 0.0; it must be positive"),
        ({"plan": {"a": "nonsense"}}, "plan: a: 'nonsense' is not a pattern"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_a_preview_says_what_compress_then_does(tmp_path):
    model = tiny_model()
    corpus = Corpus("self", 2, 16)
    found = preview(model, None, Config(bits=2.0), corpus=corpus, progress=lambda *step: None)
    report = pbsp.compress(model, None, Config(bits=2.0), corpus=corpus)
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    assert found.stored_bits == pytest.approx(report.stored_bits)
    assert found.weight_bytes == weight_bytes(tmp_path / "out")
    assert f"{found.embedding_bits} bit" == report.embeddings
    assert found.layers == pbsp.read_plan(tmp_path / "out" / "plan.toml")
    assert found.expected_loss == report.expected_loss
    assert found.seconds > 0
    assert found.memory_bytes > found.weight_bytes


def test_weights_do_not_depend_on_how_many_windows_go_back_at_a_time(monkeypatch):
    tokens = tiny_tokens(5, 16)
    found = []
    for windows_at_a_time in (5, 2):
        monkeypatch.setattr("pbsp.planning.MEASURED_WINDOWS", windows_at_a_time)
        model = tiny_model()
        with torch.no_grad():
            planned = make_plan(model, decoder_blocks(model), Config(weighting="gradient"), tokens)
        found.append(planned.token_weights)
    assert len(found[0]) == 14
    for name, weights in found[0].items():
        assert weights.shape == (80,)
        torch.testing.assert_close(weights, found[1][name])


def test_a_trial_weighs_tokens_by_squares_and_the_plan_by_lengths(monkeypatch):
    tokens = tiny_tokens(5, 16)
    monkeypatch.setattr(planning, "MEASURED_WINDOWS", 3)
    seen = {}

    def trial(model, planned, config, windows, **settings):
        seen.update(weighting=config.moment_weighting, weights=planned.token_weights, windows=windows)
        return dict.fromkeys(planned.plan.entries, 1.0)

    monkeypatch.setattr(planning, "trial_losses", trial)
    model = tiny_model()
    with torch.no_grad():
        planned = make_plan(model, decoder_blocks(model), Config(bits=2.0), tokens)
    assert planned.tried
    assert seen["weighting"] == "squares"
    assert torch.equal(seen["windows"], tokens[:3])
    for name, weights in planned.token_weights.items():
        squares = weights[: 3 * 16].square()
        torch.testing.assert_close(seen["weights"][name], squares / squares.mean())


def test_several_budgets_are_measured_once_and_give_the_plans_they_give_alone(monkeypatch):
    calls = []

    def counted(name):
        original = getattr(planning, name)

        def called(*args, **settings):
            calls.append(name)
            return original(*args, **settings)

        return called

    for name in ("measure_costs", "gradient_lengths"):
        monkeypatch.setattr(planning, name, counted(name))
    monkeypatch.setattr(planning, "MEASURED_WINDOWS", 2)
    model, measured = tiny_model("llama"), planning.Measured()

    def planned(bits, measured=None):
        config = Config(bits=bits)
        with torch.no_grad():
            return make_plan(model, decoder_blocks(model), config, windows().tokens, measured=measured)

    together = [planned(bits, measured) for bits in (1.0, 2.25)]
    assert calls == ["measure_costs", "gradient_lengths"]
    for bits, plan in zip((1.0, 2.25), together, strict=True):
        alone = planned(bits)
        assert plan.to_dict() == alone.to_dict()
        assert plan.token_weights.keys() == alone.token_weights.keys()
        assert all(
            torch.equal(plan.token_weights[name], alone.token_weights[name]) for name in alone.token_weights
        )
    assert together[0].plan != together[1].plan
    assert len(calls) == 6


def test_other_settings_are_measured_again():
    model, measured = tiny_model("llama"), planning.Measured()
    with torch.no_grad():
        plans = [
            make_plan(model, decoder_blocks(model), config, windows().tokens, measured=measured)
            for config in (Config(bits=1.5), Config(bits=1.5, options={"block": 32}))
        ]
    assert plans[0].expected_loss != plans[1].expected_loss


def test_a_mixture_of_experts_fits_its_budget():
    _, report = compressed("mixtral", bits=2.0)
    assert 1.7 < report.stored_bits <= 2.0
    assert len(report.layers) > 14
