import pytest
import torch

from pbsp.calibration.moment import Moment
from pbsp.calibration.moments import collect_moments
from pbsp.calibration.walk import Walk
from pbsp.errors import CalibrationError
from pbsp.models.blocks import decoder_blocks
from tiny import DENSE, tiny_model, tiny_tokens

SHARED = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "qwen3": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "opt": [("q_proj", "k_proj", "v_proj")],
    "gpt2": [],
}


def first_block_moments(model, tokens):
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, tokens)
    return collect_moments(blocks[0].linears(), lambda: walk.run(0, blocks[0].module, keep=False))


def test_streaming_mean_equals_the_mean_of_outer_products():
    inputs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    moment = Moment()
    for window in inputs:
        moment.update(window)
    expected = sum(torch.outer(x, x) for x in inputs.reshape(-1, 5)) / 21
    torch.testing.assert_close(moment.mean(), expected)
    assert moment.tokens == 21


@pytest.mark.parametrize("features", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_any_width_is_whole_and_symmetric(features, weighted):
    generator = torch.Generator().manual_seed(features)
    inputs = torch.randn(2, 9, features, generator=generator)
    weights = torch.rand(18, generator=generator) if weighted else torch.ones(18)
    moment = Moment()
    for window in inputs:
        moment.update(window, weights if weighted else None)
    rows = inputs.reshape(-1, features).double()
    found = moment.mean()
    torch.testing.assert_close(found, ((weights[:, None] * rows).T @ rows / 18).float())
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_moments_equal_those_of_the_models_own_forward(name):
    model, tokens = tiny_model(name), tiny_tokens()
    moments = first_block_moments(model, tokens)
    linears = decoder_blocks(model)[0].linears()
    assert moments.keys() == linears.keys()
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in linears.items()
    ]
    for window in tokens:
        model(window[None])
    for hook in hooks:
        hook.remove()
    for layer, inputs in seen.items():
        rows = torch.cat(inputs).reshape(-1, inputs[0].shape[-1])
        torch.testing.assert_close(moments[layer], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHARED)
@torch.no_grad()
def test_linears_with_the_same_input_share_one_moment(name):
    moments = first_block_moments(tiny_model(name), tiny_tokens())
    groups: dict[int, set[str]] = {}
    for layer, moment in moments.items():
        groups.setdefault(id(moment), set()).add(layer.rsplit(".", 1)[1])
    assert sorted(sorted(g) for g in groups.values() if len(g) > 1) == sorted(sorted(g) for g in SHARED[name])


@torch.no_grad()
def test_a_linear_that_is_never_called_has_no_moment():
    model = tiny_model()
    block = decoder_blocks(model)[0]
    unused = torch.nn.Linear(4, 4)
    walk = Walk(model, decoder_blocks(model), tiny_tokens())
    moments = collect_moments(
        {**block.linears(), "unused": unused}, lambda: walk.run(0, block.module, keep=False)
    )
    assert "unused" not in moments


@torch.no_grad()
def test_an_infinite_activation_names_its_layer():
    linear = torch.nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match="layer: its inputs are NaN or infinite"):
        collect_moments({"layer": linear}, lambda: linear(torch.tensor([[1.0, 2.0, torch.inf, 0.0]])))
