import pytest
import torch

from pbsp.calibration.importance import block_cosines, token_cosines
from pbsp.calibration.walk import Walk
from pbsp.errors import CalibrationError
from pbsp.models.blocks import decoder_blocks
from tiny import CONFIGS, tiny_model, tiny_tokens


@pytest.mark.parametrize("name", CONFIGS)
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
