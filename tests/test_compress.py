import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import pbsp
from pbsp.calibration.moments import collect_moments
from pbsp.calibration.walk import Walk
from pbsp.calibration.windows import Windows
from pbsp.errors import CalibrationError, ConfigError, ModelError, OutputError, PatternError
from pbsp.methods.pbsp import Pbsp
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.experts import split_experts
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import Pattern
from pbsp.solver.hessian import output_error
from saved import packed_linears
from tiny import CONFIGS, tiny_model, tiny_tokens


def windows(count=4, context=32):
    return Windows(tiny_tokens(count, context), text="random", split="test", text_digest="0")


def compressed(name="llama", pattern="4:8+2:8", **settings):
    model = tiny_model(name)
    report = pbsp.compress(model, None, pbsp.Config(pattern=pattern, **settings), corpus=windows())
    return model, report


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_compressed_model_saves_loads_and_generates(name, tmp_path):
    model, report = compressed(name)
    assert not report.left_uncompressed
    original = tiny_model(name)
    split_experts(original)
    linears = sum(len(block.linears()) for block in decoder_blocks(original))
    assert len(report.layers) == linears
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=model.dtype)
    tokens = tiny_tokens(1)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    packed, dense = loaded.generate(tokens, **settings), loaded.dequantize().generate(tokens, **settings)
    assert torch.equal(packed, dense)


@torch.no_grad()
def test_a_fresh_process_gives_the_same_logits(tmp_path, fresh):
    model, report = compressed()
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    torch.save(model(tiny_tokens(1)).logits, tmp_path / "logits.pt")
    script = (
        "import sys, torch, pbsp\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/out', dtype=torch.float16)\n"
        "tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))\n"
        "assert torch.equal(model(tokens).logits, torch.load(sys.argv[1] + '/logits.pt'))\n"
    )
    ended = fresh(script, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]


@torch.no_grad()
def test_packed_weights_are_the_solvers_and_close_to_the_original():
    original = tiny_model()
    model, report = compressed(pattern="4:8+4:8")
    for layer in report.layers:
        dense = model.get_submodule(layer.name).dense()
        weight = linear_weight(original.get_submodule(layer.name))
        assert 0 < layer.output_error < 0.2
        assert output_error(weight, dense, torch.eye(weight.shape[1])) < 0.3


@torch.no_grad()
def test_biases_survive():
    original, (model, _) = tiny_model("opt"), compressed("opt")
    for name, module in original.named_modules():
        packed = model.get_submodule(name)
        if isinstance(packed, PackedLinear):
            torch.testing.assert_close(packed.bias, module.bias.to(packed.bias.dtype))


def test_later_blocks_are_measured_behind_compressed_ones():
    _, behind_compressed = compressed(inputs="compressed")
    _, behind_original = compressed(inputs="original")
    first, last = behind_compressed.layers[0], behind_compressed.layers[-1]
    assert first == behind_original.layers[0]
    assert last.output_error != behind_original.layers[-1].output_error


def test_the_same_run_gives_the_same_bytes_and_leaves_the_callers_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = tiny_model()  # seeds by itself
    torch.manual_seed(5)
    pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=pbsp.corpus("self", samples=2, context=16))
    assert torch.equal(torch.rand(1), expected)
    again = tiny_model()
    pbsp.compress(again, None, pbsp.Config(pattern="4:8"), corpus=pbsp.corpus("self", samples=2, context=16))
    for (name, left), right in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def odd_model():
    """Hidden size 64 and 100 intermediate features: down_proj's rows do not hold whole groups of 8."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 100
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_layers_that_do_not_tile_are_left_and_listed(tmp_path):
    model = odd_model()
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    report = pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=windows())
    assert list(report.left_uncompressed) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert "4 left over" in report.left_uncompressed["model.layers.0.mlp.down_proj"]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before.half())
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    found = pbsp.inspect_folder(tmp_path / "out")
    assert found.stored_bits == pytest.approx(report.stored_bits)
    assert found.bytes_by_kind["linears left uncompressed"] == 2 * 2 * 64 * 100


def test_strict_refuses_them_before_any_work():
    model = odd_model()
    with pytest.raises(PatternError, match=r"layers\.0\.mlp\.down_proj: .*--strict"):
        pbsp.compress(model, None, pbsp.Config(pattern="4:8", strict=True), corpus=windows())
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_a_pattern_that_no_layer_can_take_is_refused():
    with pytest.raises(PatternError, match="no layer can take 1:7"):
        compressed(pattern="1:7", options={"block": 7})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_weight_that_is_not_finite_names_its_layer(value):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 8192 weights"):
        pbsp.compress(model, None, corpus=windows())


@torch.no_grad()
def test_an_activation_that_overflows_names_its_block():
    model = tiny_model()
    model.model.layers[1].mlp.gate_proj.weight *= 1e30
    model.model.layers[1].mlp.up_proj.weight *= 1e30
    with pytest.raises(CalibrationError, match=r"model\.layers\.1: the model's own output"):
        pbsp.compress(model, None, corpus=windows())


def test_a_compressed_model_is_not_compressed_again():
    model, _ = compressed()
    with pytest.raises(ModelError, match="already"):
        pbsp.compress(model, None, corpus=windows())


@torch.no_grad()
def test_a_weight_with_two_names_is_compressed_once():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=windows())
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight_scale, second.weight_scale)


@torch.no_grad()
def test_identical_rows_of_one_token_are_solved():
    model = tiny_model()
    tokens = Windows(torch.full((3, 16), 7), text="one token", split="test", text_digest="0")
    report = pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=tokens)
    assert all(layer.output_error < 1 for layer in report.layers)
    assert torch.isfinite(model(tokens.tokens).logits).all()


def test_bfloat16_models_stay_bfloat16():
    model = tiny_model().to(torch.bfloat16)
    report = pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=windows())
    assert model.dtype == torch.bfloat16
    assert all(layer.output_error < 0.3 for layer in report.layers)


def test_weights_out_of_float16_range_are_kept_in_bfloat16():
    model = tiny_model()
    model.model.embed_tokens.weight.data[0, 0] = 1e6
    pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=windows())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_the_papers_layout_saves_and_loads(name, tmp_path):
    model, report = compressed(
        name, pattern="4:8", method="pbsp", weighting="attention", options={"updates": 1}
    )
    assert not report.plain_moments
    assert {layer.layout for layer in report.layers} == {"paper"}
    assert all(0 < layer.output_error < 0.2 for layer in report.layers)
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=model.dtype)
    assert torch.equal(loaded(tiny_tokens(1)).logits, model(tiny_tokens(1)).logits)
    found = pbsp.inspect_folder(tmp_path / "out")
    assert found.stored_bits == pytest.approx(report.stored_bits)
    assert found.nominal_bits == pytest.approx(report.nominal_bits)


def test_attention_weighting_changes_the_value_projections_of_the_first_block_alone():
    _, plain = compressed(weighting="plain")
    _, weighted = compressed(weighting="attention")
    changed = [
        a.name for a, b in zip(plain.layers, weighted.layers, strict=True) if a != b and "layers.0" in a.name
    ]
    assert changed == ["model.layers.0.self_attn.v_proj"]


def test_the_papers_allocation_gives_the_more_important_block_more_weights():
    _, report = compressed("llama", pattern="4:8", method="pbsp", allocation="paper", options={"updates": 1})
    coarse = report.coarse
    assert sorted(coarse.kept) == [3, 5]
    first, second = (report.layers[0], report.layers[-1])
    assert first.pattern == f"{coarse.kept[0]}:8"
    assert second.pattern == f"{coarse.kept[1]}:8"
    assert (coarse.importances[0] > coarse.importances[1]) == (coarse.kept[0] > coarse.kept[1])
    cosines = report.to_dict()["coarse"]["cosines"]
    assert cosines == pytest.approx([1 - importance for importance in coarse.importances])


@pytest.mark.parametrize(
    "line",
    [
        "gptq bits=8",
        "billm 4:8",
        "arb rounds=2",
        "stbllm 4:8 zeros=released",
        "rtn",
    ],
)
@torch.no_grad()
def test_a_method_without_a_layout_leaves_its_values_and_counts_its_bits(line):
    model = tiny_model()
    config = pbsp.Config.parse(line)
    report = pbsp.compress(model, None, config, corpus=windows())
    assert not report.packed
    assert not packed_linears(model)
    assert getattr(model.config, "quantization_config", None) is None
    first = report.layers[0]
    weight = model.get_submodule(first.name).weight
    assert not torch.equal(weight, tiny_model().get_submodule(first.name).weight)
    assert 1 < first.stored_bits < 16
    assert model(tiny_tokens(1)).logits.isfinite().all()
    with pytest.raises(OutputError, match="not packed"):
        pbsp.save_compressed(model, None, "never", report)


@torch.no_grad()
def test_methods_that_look_at_whole_layers_solve_each_alone():
    """q, k and v share their inputs; PBSP's salient columns of one must not depend on the others."""
    _, report = compressed("llama", pattern="4:8", method="pbsp")
    model = tiny_model()
    weight = model.get_submodule(report.layers[0].name).weight.detach()
    blocks = decoder_blocks(model)
    walk = Walk(model, blocks, windows().tokens)
    linears = blocks[0].linears()
    moments = collect_moments(linears, lambda: walk.run(0, blocks[0].module, keep=False))
    alone = Pbsp(Pattern(4, 8)).compress(weight, moments[report.layers[0].name])
    expected = output_error(weight, alone.dense(), moments[report.layers[0].name])
    assert report.layers[0].output_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("setting", [{"method": "pbsp"}, {"allocation": "paper"}])
def test_the_papers_stages_take_one_plane(setting):
    with pytest.raises(ConfigError, match=r"takes one N:M, not (the )?2 planes"):
        pbsp.Config(pattern="4:8+2:8", **setting)
