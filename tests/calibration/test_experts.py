"""Calibration of experts: their own tokens, and what stands in where there are none."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import pbsp
from pbsp.calibration.experts import ExpertInputs
from pbsp.calibration.moments import collect_block_moments
from pbsp.calibration.walk import Walk
from pbsp.calibration.windows import Windows
from pbsp.models.blocks import Block, decoder_blocks
from pbsp.models.experts import split_experts
from starving import starving_model
from tiny import tiny_model, tiny_tokens


def stand_ins_of(model, tokens):
    split_experts(model)
    blocks = decoder_blocks(model)
    linears, walk = blocks[0].linears(), Walk(model, blocks, tokens)
    experts = ExpertInputs(blocks[0], windows=len(tokens))
    with experts.watching():
        moments = collect_block_moments(walk, 0, blocks[0], linears, keep=False)
    return moments.inputs, experts.stand_ins(linears, moments.inputs)


def inputs_of_experts(model, tokens):
    """What the first block's experts are given: tokens, and the experts chosen for each."""
    seen = []
    with model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args)):
        for window in tokens:
            model(window[None])
    return torch.cat([args[0] for args in seen]), torch.cat([args[1] for args in seen])


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@torch.no_grad()
def test_experts_see_their_own_tokens_alone(name):
    model, tokens = tiny_model(name), tiny_tokens()
    hidden, chosen = inputs_of_experts(model, tokens)
    inputs, stand_ins = stand_ins_of(model, tokens)
    assert not stand_ins.reasons
    for expert in range(4):
        own = hidden[(chosen == expert).any(1)]
        assert 0 < len(own) < len(hidden)
        (part,) = inputs[f"model.layers.0.mlp.experts.{expert}.gate_up"].parts
        torch.testing.assert_close(part.moment, own.T @ own / len(own))


@torch.no_grad()
def test_an_expert_without_tokens_gets_the_moment_of_its_layers_tokens():
    model, tokens = starving_model(), tiny_tokens()
    hidden, chosen = inputs_of_experts(model, tokens)
    assert sorted(chosen.unique().tolist()) == [0, 1, 2]
    gate_up, down = (
        model.model.layers[0].mlp.experts.get_parameter(f"{n}_proj")[3] for n in ("gate_up", "down")
    )
    assert down.shape == (64, 128)
    gate, up = (hidden @ gate_up.T).chunk(2, 1)
    inner = nn.functional.silu(gate) * up
    inputs, stand_ins = stand_ins_of(model, tokens)
    name = "model.layers.0.mlp.experts.3"
    assert f"{name}.down" not in inputs
    assert stand_ins.reasons.keys() == {f"{name}.gate_up", f"{name}.down"}
    assert "got 0 of 96 places of tokens; solved on 96 tokens" in stand_ins.reasons[f"{name}.down"]
    for part, rows in (("gate_up", hidden), ("down", inner)):
        (found,) = stand_ins.inputs[f"{name}.{part}"].parts
        torch.testing.assert_close(found.moment, rows.T @ rows / len(rows))


@torch.no_grad()
def test_a_model_with_a_starved_expert_is_compressed_and_says_so(tmp_path):
    model = starving_model()
    corpus = Windows(tiny_tokens(), text="random", split="test", text_digest="0")
    report = pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=corpus)
    starved = {
        f"model.layers.{index}.mlp.experts.3.{part}" for index in (0, 1) for part in ("gate_up", "down")
    }
    assert starved <= report.uncalibrated.keys()
    assert all(0 < layer.output_error < 1 for layer in report.layers)
    assert {layer.name for layer in report.layers} >= starved
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(loaded.dequantize()(tiny_tokens()).logits).all()


class Alternatives(nn.Module):
    """A block of which one of two linears in a list is never used."""

    def __init__(self):
        super().__init__()
        self.choices = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.other = nn.Linear(8, 8)


def test_of_experts_in_a_list_one_that_is_never_called_gets_the_identity():
    block = Block("block", Alternatives())
    experts = ExpertInputs(block, windows=1)
    with experts.watching():
        pass
    stand_ins = experts.stand_ins(block.linears(), {})
    assert stand_ins.reasons.keys() == {"block.choices.0", "block.choices.1"}
    assert torch.equal(stand_ins.inputs["block.choices.1"].parts[0].moment, torch.eye(8))
    assert "never called" in stand_ins.reasons["block.choices.1"]


@torch.no_grad()
def test_long_calibrations_keep_few_tokens():
    model, tokens = starving_model(), tiny_tokens(2, 32)
    split_experts(model)
    blocks = decoder_blocks(model)
    experts = ExpertInputs(blocks[0], windows=1024)
    walk = Walk(model, blocks, tokens)
    with experts.watching():
        moments = collect_block_moments(walk, 0, blocks[0], blocks[0].linears(), keep=False)
    reasons = experts.stand_ins(blocks[0].linears(), moments.inputs).reasons
    assert "solved on 8 tokens" in reasons["model.layers.0.mlp.experts.3.down"]
