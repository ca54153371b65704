import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pbsp.calibration import attention_calls
from pbsp.calibration.attention import attended_gram, draw_query_rows
from pbsp.calibration.attention_calls import watched_attention
from pbsp.calibration.moments import collect_block_moments
from pbsp.calibration.walk import Walk
from pbsp.models.blocks import decoder_blocks, linear_weight
from tiny import _SHARED, CONFIGS, tiny_tokens

_PLAIN = ("llama", "llama-untied", "qwen2", "qwen3", "gemma3", "opt", "gpt2")
ARCHITECTURES = {
    **{name: CONFIGS[name] for name in _PLAIN},
    "one-kv-head": LlamaConfig(**{**_SHARED, "num_key_value_heads": 1}),
    "all-kv-heads": LlamaConfig(**{**_SHARED, "num_key_value_heads": 4}),
    "mistral": MistralConfig(**_SHARED, sliding_window=8),
    "gemma2": Gemma2Config(**_SHARED, head_dim=32, sliding_window=8, attn_logit_softcapping=0.5),
    "phi3": Phi3Config(**_SHARED, pad_token_id=0),
    "neox": GPTNeoXConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
}
# linear layer that makes the values, the one behind the attention, kv heads
LAYOUTS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", 4),
    "opt": ("self_attn.v_proj", "self_attn.out_proj", 4),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", 2),
    "neox": ("attention.query_key_value", "attention.dense", 4),
    "one-kv-head": ("self_attn.v_proj", "self_attn.o_proj", 1),
    "all-kv-heads": ("self_attn.v_proj", "self_attn.o_proj", 4),
}
WINDOWS, CONTEXT = 3, 32


def build(name, implementation="sdpa", config=None):
    torch.manual_seed(0)
    config = copy.deepcopy(config or ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # sharper attention, and biases
    return model.eval()


def collect(model, index=0, *, weighting="attention", keep=False, linears=None, **settings):
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, tiny_tokens(WINDOWS, CONTEXT))
    for before in range(index):
        walk.run(before, blocks[before].module, keep=True)
    block = blocks[index]
    linears = block.linears() if linears is None else linears
    moments = collect_block_moments(walk, index, block, linears, weighting=weighting, keep=keep, **settings)
    return walk, block, moments


def mixed_values(walk, index, block, behind):
    """What enters the linear layer behind the attention, for all windows."""
    seen = []
    with block.module.get_submodule(behind).register_forward_pre_hook(lambda m, args: seen.append(args[0])):
        walk.run(index, block.module, keep=False)
    return torch.cat(seen).flatten(0, 1)


CASES = [(name, implementation) for name in ARCHITECTURES for implementation in ("sdpa", "eager")]
CASES.remove(("gemma2", "sdpa"))  # transformers refuses soft caps there


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("name", "implementation"), CASES)
@torch.no_grad()
def test_value_moments_give_the_change_of_the_attentions_output(name, implementation, index):
    value_name, behind, heads = LAYOUTS.get(name, ("self_attn.v_proj", "self_attn.o_proj", 2))
    walk, block, moments = collect(build(name, implementation), index)
    assert moments.plain_because == {}
    moment = moments.inputs[f"{block.name}.{value_name}"]
    others = [other for name, other in moments.inputs.items() if not name.endswith(value_name)]
    assert all(len(other.parts) == 1 for other in others)

    module = block.module.get_submodule(value_name)
    weight = linear_weight(module)
    assert [row for part in moment.parts for row in part.rows] == list(range(len(weight)))
    shared = (
        id(moment.parts[0].moment) if len(weight) > 64 else None
    )  # the queries' and keys' rows come first
    values = [part for part in moment.parts if id(part.moment) != shared]
    assert len(values) == heads
    change = torch.zeros_like(weight)
    for part in values:
        change[part.rows.start : part.rows.stop] = torch.randn(
            len(part.rows), weight.shape[1], generator=torch.Generator().manual_seed(part.rows.start)
        )
    before = mixed_values(walk, index, block, behind)
    linear_weight(module).add_(change)
    difference = mixed_values(walk, index, block, behind) - before
    expected = float(difference.square().sum(1).mean())
    assert moment.error(change) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_probabilities_are_those_of_the_attention(name):
    model = build(name, "eager" if name == "gemma2" else "sdpa")
    calls = []
    with watched_attention(calls.append):
        model(tiny_tokens(1, CONTEXT))
    assert len(calls) == 2
    for call in calls:
        rows = torch.tensor([0, 3, 20, 31])
        probabilities = call.probabilities(rows)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(probabilities), 4))
        groups = len(probabilities) // call.value.shape[1]
        mixed = probabilities @ call.value[0].repeat_interleave(groups, 0)
        torch.testing.assert_close(mixed.transpose(0, 1), call.output[0, rows], rtol=1e-4, atol=1e-5)
        assert float(probabilities[:, :, 21:][:, :3].abs().max()) == 0  # nobody looks ahead


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_weighting_changes_nothing_but_the_value_moments(keep):
    walks, moments = [], []
    for weighting in ("plain", "attention"):
        walk, _, found = collect(build("llama"), weighting=weighting, keep=keep)
        walks.append(walk)
        moments.append(found.inputs)
    assert all(map(torch.equal, walks[0].hidden, walks[1].hidden))
    plain, weighted = moments
    assert list(plain) == list(weighted)
    for name in plain:
        if name.endswith("v_proj"):
            assert [part.rows for part in weighted[name].parts] == [range(0, 16), range(16, 32)]
        else:
            assert torch.equal(plain[name].parts[0].moment, weighted[name].parts[0].moment)
    q, k, v = (plain[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert q.parts[0].moment is k.parts[0].moment is v.parts[0].moment
    q, k, v = (weighted[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert q.parts[0].moment is k.parts[0].moment
    assert v.parts[0].moment is not v.parts[1].moment


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_models_in_16_bits_are_weighted_too(dtype):
    _, block, full = collect(build("llama"))
    _, _, half = collect(build("llama").to(dtype))
    assert half.plain_because == {}
    name = f"{block.name}.self_attn.v_proj"
    for left, right in zip(full.inputs[name].parts, half.inputs[name].parts, strict=True):
        assert right.moment.dtype == torch.float32
        assert float((left.moment - right.moment).norm() / left.moment.norm()) < 0.03


@torch.no_grad()
def test_a_value_projection_that_is_not_compressed_gets_no_moment():
    model = build("llama")
    linears = {name: m for name, m in decoder_blocks(model)[0].linears().items() if "v_proj" not in name}
    _, _, moments = collect(model, linears=linears)
    assert moments.inputs.keys() == linears.keys()
    assert moments.plain_because == {}


@torch.no_grad()
def test_an_attention_outside_the_table_is_plain_and_named():
    config = FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    _, _, moments = collect(build("falcon", config=config))
    assert all(len(moment.parts) == 1 for moment in moments.inputs.values())
    assert moments.plain_because == {
        "transformer.h.0": "its attention is not computed by one of transformers' attention functions"
    }


@torch.no_grad()
def test_values_that_are_changed_after_their_projection_are_plain_and_named():
    model = build("llama")
    projection = model.model.layers[0].self_attn.v_proj
    model.model.layers[0].self_attn.v_proj = torch.nn.Sequential(projection, torch.nn.RMSNorm(32))
    _, _, moments = collect(model)
    assert moments.plain_because == {
        "model.layers.0.self_attn": "its values are not the outputs of one linear layer as they are"
    }


@torch.no_grad()
def test_probabilities_that_do_not_give_the_output_are_not_used(monkeypatch):
    monkeypatch.setattr(attention_calls, "_mask_rows", lambda call, rows: None)
    _, _, moments = collect(build("llama"))
    assert moments.plain_because == {
        "model.layers.0.self_attn.v_proj": "its attention's output is not its probabilities times its values"
    }


@torch.no_grad()
def test_the_table_is_as_before_even_after_an_error():
    def refuse(call):
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"), watched_attention(refuse):
        build("llama")(tiny_tokens(1))
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


@torch.no_grad()
def test_drawn_query_rows_are_unbiased_and_seeded():
    def moment(**settings):
        _, block, moments = collect(build("llama"), **settings)
        return moments.inputs[f"{block.name}.self_attn.v_proj"].parts[0].moment

    exact = moment()
    assert torch.equal(moment(query_rows=CONTEXT), exact)
    assert torch.equal(moment(query_rows=10, seed=3), moment(query_rows=10, seed=3))
    mean = sum(moment(query_rows=10, seed=seed) for seed in range(60)) / 60
    single = float((moment(query_rows=10) - exact).norm() / exact.norm())
    assert float((mean - exact).norm() / exact.norm()) < single / 3


@pytest.mark.parametrize(("context", "count"), [(1, 5), (7, 7), (7, 6), (1000, 1), (97, 13)])
def test_every_position_is_drawn_equally_often(context, count):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_query_rows(context, count, generator=generator) for _ in range(3000)])
    assert draws.shape[1] == min(context, count)
    assert bool((draws.diff(dim=1) >= 0).all())
    frequency = torch.bincount(draws.flatten(), minlength=context) / 3000 * context / draws.shape[1]
    assert float((frequency - 1).square().mean()) < 2 * context / draws.shape[1] / 3000


@pytest.mark.parametrize("shape", [(2, 4, 5, 50), (6, 20, 20, 8)])
def test_both_orders_of_products_give_the_gram(shape):
    heads, queries, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(heads, queries, tokens, generator=generator)
    inputs = torch.randn(tokens, width, generator=generator)
    expected = sum((a @ inputs).T @ (a @ inputs) for a in probabilities)
    torch.testing.assert_close(attended_gram(probabilities, inputs), expected, rtol=1e-4, atol=1e-3)
