"""Fused experts as linears: the same outputs, and the way back."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen2MoeConfig

from pbsp.errors import ModelError
from pbsp.models.blocks import decoder_blocks, is_listed
from pbsp.models.experts import ExpertLinears, fuse_experts, is_fused, split_experts
from tiny import CONFIGS, tiny_tokens

SHARED = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MOE = {
    "mixtral": CONFIGS["mixtral"],
    "qwen3-moe": CONFIGS["qwen3-moe"],
    "qwen2-moe": Qwen2MoeConfig(
        **SHARED, num_experts=6, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    # biases, transposed weights, and gate and up in turns
    "gpt-oss": GptOssConfig(**SHARED, intermediate_size=128, num_local_experts=4, head_dim=16),
}


def moe_model(name, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(MOE[name])
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in model.modules():
        if is_fused(module):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", MOE)
@torch.no_grad()
def test_linears_compute_what_fused_experts_do_and_can_be_fused_again(name, implementation):
    model = moe_model(name)
    model.set_experts_implementation(implementation)
    expected, state = model(tiny_tokens()).logits, copy.deepcopy(model.state_dict())
    split_experts(model)
    assert any(isinstance(module, ExpertLinears) for module in model.modules())
    assert not any(map(is_fused, model.modules()))
    torch.testing.assert_close(model(tiny_tokens()).logits, expected, rtol=1e-5, atol=1e-6)
    fuse_experts(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    torch.testing.assert_close(model(tiny_tokens()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MOE)
def test_every_expert_is_a_pair_of_linears_and_routers_are_none(name):
    model = moe_model(name)
    split_experts(model)
    experts = getattr(model.config, "num_local_experts", 0) or model.config.num_experts
    for block in decoder_blocks(model):
        names = {linear.removeprefix(f"{block.name}.mlp.") for linear in block.linears() if ".mlp." in linear}
        expected = {f"experts.{index}.{part}" for index in range(experts) for part in ("gate_up", "down")}
        shared = {f"shared_expert.{part}_proj" for part in ("gate", "up", "down")}
        assert names == expected | (shared if name == "qwen2-moe" else set())
        assert is_listed(block, f"{block.name}.mlp.experts.1.down")
        assert not is_listed(block, f"{block.name}.self_attn.q_proj")


@torch.no_grad()
def test_a_layer_whose_own_forward_does_something_else_is_refused(monkeypatch):
    model = moe_model("mixtral")
    experts = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(experts, "_apply_gate", lambda self, x: x.chunk(2, -1)[0])
    model.set_experts_implementation("eager")  # which does not ask for `_apply_gate`
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts: its experts, .* other outputs"):
        split_experts(model)


def test_only_experts_that_hold_a_named_linear_are_split():
    model = moe_model("mixtral")
    split_experts(model, holding={"model.layers.1.mlp.experts.0.down", "model.layers.0.mlp.gate"})
    split = [isinstance(layer.mlp.experts, ExpertLinears) for layer in model.model.layers]
    assert split == [False, True]
    base = moe_model("mixtral").model
    split_experts(base, holding={"model.layers.1.mlp.experts.0.down"})
    assert isinstance(base.layers[1].mlp.experts, ExpertLinears)


@torch.no_grad()
def test_no_tokens_give_no_outputs():
    model = moe_model("mixtral")
    split_experts(model)
    experts = model.model.layers[0].mlp.experts
    outputs = experts(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert outputs.shape == (0, 64)


def test_splitting_on_the_meta_device_makes_no_tensor():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MOE["mixtral"])
    split_experts(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.model.layers[1].mlp.experts[3]["down"].weight.shape == (64, 128)
