import pytest
import torch

from pbsp.calibration.walk import Walk
from pbsp.errors import ModelError
from pbsp.models.blocks import decoder_blocks
from pbsp.models.experts import split_experts
from tiny import CONFIGS, tiny_model, tiny_tokens


def logits_behind_the_walk(model, tokens):
    """The model's logits, its decoder blocks replaced by the hidden states that the walk ends with."""
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, tokens)
    for index, block in enumerate(blocks):
        walk.run(index, block.module, keep=True)
    results = []
    for window, hidden in zip(tokens, walk.hidden, strict=True):

        def replace(module, args, output, hidden=hidden):
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with blocks[-1].module.register_forward_hook(replace):
            results.append(model(window[None]).logits)
    return torch.cat(results)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_walk_reproduces_the_models_own_logits_for_every_window(name, attention):
    model, tokens = tiny_model(name, attention=attention), tiny_tokens()
    expected = model(tokens).logits
    split_experts(model)
    torch.testing.assert_close(logits_behind_the_walk(model, tokens), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_walk_without_keep_leaves_the_hidden_states():
    model = tiny_model()
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, tiny_tokens())
    before = [hidden.clone() for hidden in walk.hidden]
    walk.run(0, blocks[0].module, keep=False)
    assert all(map(torch.equal, before, walk.hidden))


@torch.no_grad()
def test_walk_refuses_a_block_that_remembers_its_calls():
    model = tiny_model()
    layer = model.model.layers[1]
    forward, calls = layer.forward, []

    def drifting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs) * (1 + 0.01 * len(calls))

    layer.forward = drifting
    with pytest.raises(ModelError, match=r"model\.layers\.1 alone gives other hidden states"):
        Walk(model, decoder_blocks(model), tiny_tokens())


@torch.no_grad()
def test_walk_refuses_a_model_that_skips_a_block():
    model = tiny_model()
    blocks = decoder_blocks(model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match=r"called its 2 decoder blocks 1 times"):
        Walk(model, blocks, tiny_tokens())
