"""The same code on a GPU: results are the CPU's, but for the order of float32 sums."""

import copy

import pytest
import torch

import pbsp
from pbsp.binarization.codebook import best_codes, enumerated_codes
from pbsp.binarization.scales import decode_scales, encode_scales
from pbsp.calibration.windows import Windows
from pbsp.cli import main
from pbsp.config import Config
from pbsp.evaluation.perplexity import evaluate
from pbsp.generation import generate
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import Pattern
from pbsp.recover import recover
from pbsp.recovery.tunable import Tuning
from pbsp.unfinished import Unfinished
from random_planes import random_planes
from saved import load, logits, packed_linears
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda", 0)
METHODS = [
    {"pattern": "4:8+2:8"},
    {"pattern": "4:16"},
    {"pattern": "2:8", "embeddings": "8"},
    {"bits": 1.5},
    {"pattern": "4:8", "weighting": "gradient"},
    {"method": "pbsp", "pattern": "4:8"},
    {"method": "pbsp", "pattern": "4:8", "allocation": "paper", "spread": 1},
    {"method": "gptq", "options": {"bits": 3}},
    {"method": "billm"},
    {"method": "arb"},
    {"method": "stbllm", "pattern": "4:8"},
    {"method": "prune-then-binarize", "pattern": "4:8"},
    {"method": "nanoquant", "options": {"bits": 1.0}},
    {"method": "rtn"},
]


def windows(count=12, context=32):
    return Windows(tiny_tokens(count, context), text="random", split="test", text_digest="0")


def compressed(device, name="llama", **settings):
    model = tiny_model(name).to(device)
    return model, pbsp.compress(model, None, Config(**settings), corpus=windows())


@pytest.mark.parametrize("offset", [-126, -20, 0, 7, 100])
def test_scales_have_the_same_bits(offset):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    scales = decode_scales(codes, offset)
    assert torch.equal(decode_scales(codes.to(GPU), offset).cpu(), scales)
    assert torch.equal(encode_scales(scales.to(GPU), offset).cpu(), codes)


@pytest.mark.parametrize("patterns", ["4:8+2:8", "4:16", "8:8", "1:4+2:16"])
def test_packed_planes_hold_the_same_numbers(patterns):
    planes = random_planes(patterns, rows=24, columns=208)
    here = PackedLinear.of(planes)
    there = copy.deepcopy(here).to(GPU)
    assert torch.equal(there.dense().cpu(), here.dense())
    back = copy.deepcopy(there).cpu()
    assert torch.equal(back.packed.codes, here.packed.codes)
    x = torch.randn(5, 208)
    assert torch.allclose(there(x.to(GPU)).cpu(), x @ here.dense().T, atol=1e-4)


@pytest.mark.parametrize("pattern", ["4:8", "2:8", "2:16", "4:16"])
def test_codes_are_as_good_as_the_cpus(pattern):
    pattern = Pattern.parse(pattern)
    root = torch.randn(pattern.group, pattern.group)
    metric = root @ root.T + torch.eye(pattern.group)
    correlation = metric @ torch.randn(pattern.group, 50)
    scale = torch.rand(50)

    def loss(code):
        code = code.cpu()
        return scale * ((metric @ code) * code).sum(0) - 2 * (code * correlation).sum(0)

    search = enumerated_codes if pattern.code_count <= 4096 else best_codes
    found = search(correlation.to(GPU), metric.to(GPU), scale.to(GPU), pattern)
    if search is enumerated_codes:
        best = enumerated_codes(correlation, metric, scale, pattern)
        assert torch.allclose(loss(found), loss(best), rtol=1e-5, atol=1e-4)
    assert bool(((found != 0).sum(0) == pattern.kept).all())


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(map(str, settings.values())))
@torch.no_grad()
def test_every_method_gives_errors_like_the_cpus(settings):
    model, report = compressed(GPU, **settings)
    _, expected = compressed("cpu", **settings)
    assert {parameter.device for parameter in model.parameters()} == {GPU}
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    errors = torch.tensor([[one.output_error for one in found.layers] for found in (report, expected)])
    assert errors[0].mean() == pytest.approx(float(errors[1].mean()), rel=0.05)
    if "bits" not in settings:
        assert report.stored_bits == expected.stored_bits


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon", "qwen3-moe"])
@torch.no_grad()
def test_what_a_gpu_made_is_saved_and_loaded_anywhere(name, tmp_path):
    model, report = compressed(GPU, name, pattern="4:8+2:8")
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    here = load(tmp_path / "out", dtype=torch.float32)
    there = load(tmp_path / "out", dtype=torch.float32, device_map="cuda")
    assert {parameter.device for parameter in there.parameters()} == {GPU}
    for name, layer in packed_linears(here).items():
        assert torch.equal(there.get_submodule(name).dense().cpu(), layer.dense()), name
    expected = logits(here)
    found = there(tiny_tokens().to(GPU)).logits.cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_stopped_run_goes_on(tmp_path):
    def run(stop_before=None):
        def progress(stage, done, total):
            if stage == "compress" and done == stop_before:
                raise KeyboardInterrupt

        model = tiny_model().to(GPU)
        settings = Config(pattern="2:8", recover="block")
        return pbsp.compress(
            model, None, settings, corpus=windows(), progress=progress, unfinished=Unfinished(tmp_path)
        )

    with pytest.raises(KeyboardInterrupt):
        run(stop_before=1)
    report = run()
    whole = compressed(GPU, pattern="2:8", recover="block")[1]
    for found, expected in zip(report.layers, whole.layers, strict=True):
        assert found.output_error == pytest.approx(expected.output_error, rel=0.02)


def test_recovery_brings_the_model_nearer(monkeypatch, tmp_path):
    monkeypatch.setattr("pbsp.recovery.model.TOKENS_A_STEP", 64)
    original = tiny_model().to(GPU)
    model = copy.deepcopy(original)
    report = pbsp.compress(model, None, Config(pattern="2:8", recover="block"), corpus=windows())
    assert all(one.after <= one.before for one in report.recovered)
    model = torch.nn.Module.float(model)
    kept = Unfinished(tmp_path)
    tuned = recover(
        model, original, report, windows=windows(33), tuning=Tuning(3, 1e-2, 1e-2), unfinished=kept
    )
    assert tuned.distilled is not None
    assert tuned.distilled.after < tuned.distilled.before


def test_perplexity_is_the_cpus():
    here, there = tiny_model(), tiny_model().to(GPU)
    text = windows(3, 64)
    expected = evaluate(here, text, original=here)
    found = evaluate(there, text, original=there)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.device == "cuda:0"


def test_greedy_text_is_the_cpus():
    tokenizer = tiny_tokenizer()
    model, _ = compressed(GPU, pattern="4:8+2:8")
    model = torch.nn.Module.float(model)  # the model's own refuses: it is quantized
    here = copy.deepcopy(model).cpu()
    texts = {generate(one, tokenizer, "abc", max_tokens=8).text for one in (here, model)}
    assert len(texts) == 1


def test_the_command_uses_the_gpu(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--calibration", "self", "--samples", "4", "--context", "24", "--device", "cuda"]
    measured = ["--text", str(tmp_path / "text"), "--context", "24", "--device", "cuda"]
    (tmp_path / "text").write_text("Some words to be measured on. " * 20)
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--bits", "2", *options])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path / "out"), *measured])
    assert ended.value.code == 0, capsys.readouterr().err
