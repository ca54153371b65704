"""What a trial says of a layer against finite differences, and what plans make of it."""

import copy
from dataclasses import replace

import pytest
import torch

from pbsp.allocation.budget import Choice
from pbsp.allocation.measured import Costs, LayerCosts
from pbsp.allocation.menu import MENU
from pbsp.allocation.plan import Plan, uniform_plan
from pbsp.config import Config
from pbsp.errors import CalibrationError
from pbsp.models.blocks import decoder_blocks
from pbsp.models.experts import split_experts
from pbsp.planned import Planned
from pbsp.planning import make_plan
from pbsp.pruning.pattern import parse_patterns
from pbsp.recovery.divergence import divergence
from pbsp.trial import error_losses, trial_losses
from tiny import tiny_model, tiny_tokens

SMALL, LARGE = parse_patterns("2:8"), parse_patterns("3:8+3:8")


@torch.no_grad()
def disturbed(model):
    """A copy whose linears differ, and their names."""
    changed = copy.deepcopy(model)
    names = [name for block in decoder_blocks(changed) for name in block.linears()]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        weight = changed.get_submodule(name).weight
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return changed, names


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_layers_loss_is_half_the_slope_along_its_error(architecture):
    model = tiny_model(architecture).double()
    changed, names = disturbed(model)
    tokens = tiny_tokens(3, 24)
    found = error_losses(model, changed, names, tokens)
    assert list(found) == names

    def mean(scale, name):
        scaled = copy.deepcopy(changed)
        weight, original = (one.get_submodule(name).weight for one in (scaled, model))
        weight.copy_(original + scale * (weight - original))
        return float(sum(divergence(scaled, model, window) for window in tokens)) / len(tokens)

    with torch.no_grad():
        for name in names[::5]:
            slope = (mean(1.05, name) - mean(0.95, name)) / 0.1
            assert found[name] == pytest.approx(slope / 2, rel=1e-2, abs=1e-2 * max(found.values()))


def test_small_errors_add_up_to_the_divergence():
    model = tiny_model("llama").double()
    changed, names = disturbed(model)
    for name in names:
        weight, original = (one.get_submodule(name).weight.data for one in (changed, model))
        weight.copy_(original + 0.03 * (weight - original))
    tokens = tiny_tokens(3, 24)
    with torch.no_grad():
        whole = sum(float(divergence(changed, model, window)) for window in tokens) / len(tokens)
    assert sum(error_losses(model, changed, names, tokens).values()) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_trial_leaves_the_model_as_it_is(architecture):
    model = tiny_model(architecture)
    split_experts(model)
    before = copy.deepcopy(model.state_dict())
    planned = Planned(uniform_plan(decoder_blocks(model), LARGE, strict=False), 16)
    found = trial_losses(model, planned, Config(bits=2.5, weighting="plain"), tiny_tokens(3, 24))
    assert found.keys() <= planned.plan.entries.keys()
    assert all(value == value for value in found.values())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.is_meta or torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_are_told_in_order():
    model = tiny_model("llama")
    planned = Planned(uniform_plan(decoder_blocks(model), SMALL, strict=False), 16)
    told = []
    config = Config(bits=2.5, weighting="plain")
    trial_losses(model, planned, config, tiny_tokens(3, 24), progress=lambda *step: told.append(step))
    blocks = len(decoder_blocks(model))
    assert told == [(done, blocks + 3) for done in [*range(blocks + 1), *range(blocks, blocks + 3)]]


def costs(**losses):
    """Of layers that all have two choices, the larger one a tenth of the smaller one's loss."""
    tiling = Plan(dict.fromkeys(losses, SMALL), {}, {})
    layers = {
        name: LayerCosts(64, {SMALL: Choice(64, loss), LARGE: Choice(160, loss / 10)})
        for name, loss in losses.items()
    }
    return Costs(tiling, layers, 0, {})


def test_what_cost_more_than_expected_costs_more_in_the_next_plan():
    first = costs(a=1.0, b=1.0, c=2.0)
    plan = replace(first.tiling, entries={"a": SMALL, "b": SMALL, "c": SMALL})
    second = first.corrected(plan, {"a": 4.0, "b": 0.5, "c": 3.5})
    # against expectation 2, 1/4 and 7/8, all to the power 0.65, and then 4 in sum again
    factors = [2**0.65, 0.25**0.65, 0.875**0.65]
    scale = 4 / (factors[0] + factors[1] + 2 * factors[2])
    for (name, layer), factor in zip(second.layers.items(), factors, strict=True):
        for entry, choice in layer.choices.items():
            old = first.layers[name].choices[entry]
            assert choice.bits == old.bits
            assert choice.loss == pytest.approx(old.loss * factor * scale)
    assert second.expected_loss(plan) == pytest.approx(first.expected_loss(plan))
    assert first.plan(64 + 64 + 160).entries["c"] == LARGE
    dearer = first.corrected(plan, {"a": 8.0, "b": 1.0, "c": 1.0})
    assert dearer.plan(64 + 64 + 160).entries["a"] == LARGE


def test_a_layer_that_seems_to_help_is_cheap_and_one_that_was_not_reached_as_expected():
    first = costs(a=1.0, b=1.0, c=1.0)
    plan = first.tiling
    second = first.corrected(plan, {"a": -0.5, "b": 2.5})
    assert second.layers["a"].choices[SMALL].loss > 0
    ratio = second.layers["b"].choices[SMALL].loss / second.layers["a"].choices[SMALL].loss
    assert ratio == pytest.approx((2.5 * 8) ** 0.65)
    unreached = second.layers["c"].choices[SMALL].loss
    assert second.layers["a"].choices[SMALL].loss < unreached < second.layers["b"].choices[SMALL].loss


@pytest.mark.parametrize("losses", [{}, {"a": 0.0, "b": 0.0}, {"a": float("nan"), "b": 1.0}, {"a": -1.0}])
def test_a_trial_that_says_nothing_changes_nothing(losses):
    first = costs(a=1.0, b=1.0)
    assert first.corrected(first.tiling, losses) is first


def test_layers_of_one_weight_are_one():
    first = costs(a=1.0, b=1.0)
    tiling = replace(first.tiling, entries=dict.fromkeys("abc", SMALL), same_as={"c": "a"})
    first = replace(first, tiling=tiling)
    second = first.corrected(tiling, {"a": 1.0, "b": 1.0, "c": 1.0})
    ratio = second.layers["a"].choices[SMALL].loss / second.layers["b"].choices[SMALL].loss
    assert ratio == pytest.approx(2**0.65)


def test_the_plan_of_a_budget_is_tried_unless_that_is_refused():
    model, tokens = tiny_model("llama"), tiny_tokens(4, 32)
    with torch.no_grad():
        plans = [
            make_plan(model, decoder_blocks(model), Config(bits=2.0, trial=trial), tokens)
            for trial in (True, False)
        ]
    assert plans[0].plan != plans[1].plan
    names = {name for block in decoder_blocks(model) for name in block.linears()}
    assert all(entry in MENU for plan in plans for entry in plan.plan.entries.values())
    assert plans[0].plan.entries.keys() == names


@pytest.mark.parametrize(("free", "tried"), [(10 << 30, True), (2 << 30, False), (None, True)])
def test_a_plan_is_not_tried_where_a_copy_has_no_room(monkeypatch, free, tried):
    monkeypatch.setattr("pbsp.models.memory.free_bytes", lambda device: free)
    model, tokens = tiny_model("llama"), tiny_tokens(2, 16)
    with torch.no_grad():
        planned = make_plan(model, decoder_blocks(model), Config(bits=2.0), tokens)
    assert planned.tried == tried
    again = Planned.from_dict(planned.to_dict(), planned.token_weights)
    assert again == planned


def test_a_trial_that_overflows_is_no_trial(monkeypatch):
    model, tokens = tiny_model("llama"), tiny_tokens(2, 16)

    def refuse(*_):
        raise CalibrationError("not finite")

    with torch.no_grad():
        monkeypatch.setattr("pbsp.trial.divergence", refuse)
        planned = make_plan(model, decoder_blocks(model), Config(bits=2.0), tokens)
        alone = make_plan(model, decoder_blocks(model), Config(bits=2.0, trial=False), tokens)
    assert not planned.tried
    assert planned.plan == alone.plan
