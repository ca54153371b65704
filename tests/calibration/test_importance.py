import pytest
import torch

from pbsp.calibration.importance import block_cosines, outlier_ratios, token_cosines
from pbsp.calibration.walk import Walk
from pbsp.errors import CalibrationError
from pbsp.models.blocks import decoder_blocks, linear_weight
from tiny import DENSE, tiny_model, tiny_tokens


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_cosines_are_between_every_blocks_input_and_output(name):
    model, tokens = tiny_model(name), tiny_tokens()
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, tokens)
    expected = []
    for index, block in enumerate(blocks):
        before = torch.cat(walk.hidden)
        walk.run(index, block.module, keep=True)
        expected.append(float(torch.cosine_similarity(before, torch.cat(walk.hidden), dim=-1).mean()))
    assert block_cosines(model, blocks, tokens) == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_measuring_leaves_a_walk_and_the_model_alone():
    model, tokens = tiny_model(), tiny_tokens()
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, tokens)
    before = [hidden.clone() for hidden in walk.hidden]
    block_cosines(model, blocks, tokens)
    assert all(map(torch.equal, before, walk.hidden))
    assert not blocks[0].module._forward_hooks
    assert not blocks[0].module._forward_pre_hooks


def test_cosines_by_hand():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    behind = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-5.0, 0.0], [1.0, 1.0]])
    assert token_cosines(before, behind).tolist() == pytest.approx([1, 0, -1, 0])


@torch.no_grad()
def test_hidden_states_that_are_not_finite_name_their_block():
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1"):
        block_cosines(model, decoder_blocks(model), tiny_tokens())


def outliers_by_loop(weight, inputs):
    """How many of a linear's scores are above six times their mean, in Python's floats."""
    size = weight.double().abs()
    rows, columns = size.sum(1).tolist(), size.sum(0).tolist()
    norms = inputs.double().square().sum(0).sqrt().sqrt().tolist()
    scores = [
        (value / columns[j] + value / rows[i]) * norms[j]
        for i, row in enumerate(size.tolist())
        for j, value in enumerate(row)
    ]
    mean = sum(scores) / len(scores)
    return sum(score > 6 * mean for score in scores), len(scores)


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_outlier_ratios_equal_a_slow_loop(name):
    model, tokens = tiny_model(name), tiny_tokens()
    blocks = decoder_blocks(model)
    for block in blocks:
        for seed, module in enumerate(block.linears().values()):
            generator = torch.Generator().manual_seed(seed)
            spikes = torch.rand(module.weight.shape, generator=generator) < 0.02 * (1 + blocks.index(block))
            module.weight[spikes] *= 30  # random weights have hardly any outliers
    inputs, hooks = {}, []
    for block in blocks:
        for linear, module in block.linears().items():

            def keep(module, args, linear=linear):
                inputs.setdefault(linear, []).append(args[0].reshape(-1, args[0].shape[-1]))

            hooks.append(module.register_forward_pre_hook(keep))
    for window in tokens:
        model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    expected = []
    for block in blocks:
        counts = [
            outliers_by_loop(linear_weight(module), torch.cat(inputs[linear]))
            for linear, module in block.linears().items()
        ]
        outlying, weights = (sum(numbers) for numbers in zip(*counts, strict=True))
        expected.append(outlying / weights)
    assert outlier_ratios(model, blocks, tokens) == pytest.approx(expected, abs=1e-4)
    assert 0 < expected[0] < expected[1]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_inputs_that_are_not_finite_name_their_block(value):
    model = tiny_model()
    model.model.layers[1].input_layernorm.weight[3] = value
    with pytest.raises(CalibrationError, match=r"model\.layers\.1: "):
        outlier_ratios(model, decoder_blocks(model), tiny_tokens())


@torch.no_grad()
def test_a_linear_that_is_never_called_is_named():
    model = tiny_model()
    model.model.layers[0].mlp.forward = lambda hidden: hidden
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.mlp\.gate_proj: its inputs are missing"):
        outlier_ratios(model, decoder_blocks(model), tiny_tokens())
