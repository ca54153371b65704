import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pbsp.errors import ModelError
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.experts import split_experts
from tiny import CONFIGS, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_hold_every_linear_but_the_head(name):
    model = tiny_model(name)
    split_experts(model)
    blocks = decoder_blocks(model)
    assert len(blocks) == 2
    names = {layer for block in blocks for layer in block.linears()}
    modules = dict(model.named_modules())
    expected = {n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)} - {"lm_head"}
    assert names == expected


def test_conv1d_weights_are_read_as_out_in():
    block = decoder_blocks(tiny_model("gpt2"))[0]
    shapes = {name.split(".", 3)[3]: tuple(linear_weight(m).shape) for name, m in block.linears().items()}
    assert shapes["mlp.c_fc"] == (256, 64)
    assert shapes["attn.c_attn"] == (192, 64)


def test_experts_fused_in_an_unknown_way_are_refused_by_name():
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True  # of which nothing is known here
    split_experts(model)
    with pytest.raises(ModelError, match=r"model\.layers\.0 .*mlp\.experts\.gate_up_proj"):
        decoder_blocks(model)


def test_a_model_without_blocks_is_refused():
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(ModelError, match="no decoder blocks found in LlamaForCausalLM"):
        decoder_blocks(model)


def test_weights_in_half_precision_are_found_too():
    block = decoder_blocks(tiny_model().to(torch.float16))[0]
    assert len(block.linears()) == 7
