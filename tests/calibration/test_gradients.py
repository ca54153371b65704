from functools import partial

import pytest
import torch

from pbsp.calibration.gradients import BackwardWalk
from pbsp.calibration.moment import Moment
from pbsp.calibration.moments import collect_block_moments
from pbsp.calibration.sensitivity import (
    cut_lengths,
    gradient_lengths,
    measure_sensitivities,
    token_weights,
)
from pbsp.calibration.walk import Walk
from pbsp.errors import ModelError
from pbsp.models.blocks import decoder_blocks
from pbsp.models.experts import split_experts
from tiny import tiny_model, tiny_tokens

NAMES = ["llama", "qwen2", "gemma3", "opt", "gpt2", "gpt-neox", "falcon", "phi3"]


def autograd(model, window):
    """Inputs of all linears and the loss's gradients at their outputs, by one ordinary backward pass."""
    inputs, outputs, hooks = {}, {}, []
    for block in decoder_blocks(model):
        for name, module in block.linears().items():

            def after(module, args, output, name=name):
                inputs[name], outputs[name] = args[0], output

            hooks.append(module.register_forward_hook(after))
    logits = model(input_ids=window, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return inputs, dict(zip(outputs, gradients, strict=True)), loss


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_one_backward_pass(name):
    model = tiny_model(name)
    tokens = tiny_tokens(2, 12)
    blocks = decoder_blocks(model)
    found = {}
    with torch.no_grad():
        walk = BackwardWalk(model, blocks, tokens)
        for _ in blocks:
            walk.step(lambda window, name, inputs, gradient: found.update({(window, name): gradient}))
    for window in range(2):
        _, expected, _ = autograd(model, tokens[window : window + 1])
        for linear, gradient in expected.items():
            torch.testing.assert_close(found[window, linear], gradient, rtol=1e-3, atol=1e-5)
    assert not any("forward" in vars(block.module) for block in blocks)


def test_sensitivities_are_the_means_over_all_tokens():
    model = tiny_model()
    tokens = tiny_tokens(3, 12)
    found = {}
    with torch.no_grad():
        measure_sensitivities(
            model, decoder_blocks(model), tokens, lambda name, one: found.update({name: one})
        )
    parts = [autograd(model, window[None])[:2] for window in tokens]
    for name, sensitivity in found.items():
        lengths = [part[1][name][0].square().sum(1) for part in parts]
        cut = torch.cat([one.clamp_max(one.quantile(0.999)) for one in lengths])
        inputs = torch.cat([part[0][name][0] for part in parts])
        gradients = torch.cat([part[1][name][0] for part in parts])
        gradients *= (cut / torch.cat(lengths).clamp_min(1e-30)).sqrt()[:, None]
        expected = inputs.T @ (inputs * cut[:, None]) / cut.sum()
        torch.testing.assert_close(sensitivity.moment, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(sensitivity.row_energy, gradients.square().mean(0), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(sensitivity.lengths, cut, rtol=1e-3, atol=1e-9)


def test_a_model_that_adds_its_input_after_the_blocks_is_refused():
    class Skipping(torch.nn.Module):
        """A final norm that is not a function of the last block's output alone."""

        def __init__(self, norm, embedding):
            super().__init__()
            self.norm, self.calls = norm, 0

        def forward(self, hidden):
            self.calls += 1
            return self.norm(hidden) * self.calls

    model = tiny_model()
    model.model.norm = Skipping(model.model.norm, None)
    with torch.no_grad(), pytest.raises(ModelError, match="cannot be run alone"):
        BackwardWalk(model, decoder_blocks(model), tiny_tokens(1, 12))


@pytest.mark.parametrize("weighting", ["gradient", "squares"])
def test_moments_weighted_by_squared_gradients_are_those_of_the_sensitivities(weighting):
    """The same tokens, weights and inputs by two ways: backward through the blocks, and a walk forward.

    But with "gradient" the tokens of value projections count as the attention mixes them.
    """
    model = tiny_model()
    tokens = tiny_tokens(3, 12)
    blocks = decoder_blocks(model)
    found = {}
    with torch.no_grad():
        measure_sensitivities(model, blocks, tokens, lambda name, one: found.update({name: one}))
        weights = {name: one.lengths / one.lengths.mean() for name, one in found.items()}
        walk, other = Walk(model, blocks, tokens), Walk(model, blocks, tokens)
        for index, block in enumerate(blocks):
            measure = partial(collect_block_moments, index=index, block=block, linears=block.linears())
            moments = measure(walk, weighting=weighting, weights=weights, keep=True)
            attention = measure(other, weighting="attention", keep=True)
            assert not moments.plain_because
            for name, moment in moments.inputs.items():
                if name.endswith("v_proj") and weighting == "gradient":
                    pairs = zip(moment.parts, attention.inputs[name].parts, strict=True)
                    assert all(torch.equal(left.moment, right.moment) for left, right in pairs)
                else:
                    (part,) = moment.parts
                    torch.testing.assert_close(part.moment, found[name].moment, rtol=1e-3, atol=1e-5)


def test_one_token_in_a_thousand_is_cut():
    lengths = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    lengths[7] = 1e9
    assert cut_lengths(lengths).max() < 1.01
    assert torch.equal(
        cut_lengths(lengths)[8:3000], lengths[8:3000].clamp_max(float(cut_lengths(lengths).max()))
    )
    assert torch.equal(cut_lengths(torch.zeros(5)), torch.zeros(5))


def test_weighted_moments_equal_a_sum_over_tokens():
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(2, 7, 4, generator=generator), torch.rand(14, generator=generator)
    moment = Moment()
    for window in inputs:
        moment.update(window, weights)
    rows = inputs.reshape(14, 4)
    expected = sum(weight * torch.outer(row, row) for weight, row in zip(weights, rows, strict=True)) / 14
    torch.testing.assert_close(moment.mean(), expected)


def test_lengths_without_moments_are_those_of_the_sensitivities():
    model = tiny_model("mixtral")
    split_experts(model)
    tokens = tiny_tokens(3, 12)
    blocks = decoder_blocks(model)
    found = {}
    with torch.no_grad():
        measure_sensitivities(model, blocks, tokens, lambda name, one: found.update({name: one.lengths}))
        lengths = gradient_lengths(model, blocks, tokens)
    assert lengths.keys() == found.keys()
    for name, one in lengths.items():
        assert torch.equal(one, found[name]), name


def test_tokens_weigh_as_their_gradients_are_long():
    weights = token_weights(torch.tensor([1.0, 4.0, 0.0, 9.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.0, 3.0]) / 1.5)


def test_weights_without_gradients_are_alike():
    assert torch.equal(token_weights(torch.zeros(5)), torch.ones(5))
    assert float(token_weights(torch.rand(100)).mean()) == pytest.approx(1, rel=1e-5)
