"""Faults that users of such tools report and that no other test provokes; docs/reliability.md lists all."""

import copy
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.errors import ModelError
from pbsp.inspection import inspect_folder
from pbsp.methods.planes import PlaneFit
from pbsp.models.load import load_model
from pbsp.pruning.pattern import parse_patterns
from saved import packed_linears
from tiny import CONFIGS, tiny_model, tiny_tokenizer, tiny_tokens
from variants import layer_problem

WINDOWS = Windows(tiny_tokens(2, 16), text="random", split="test", text_digest="0")
FAST = pbsp.Config(pattern="4:8", options={"sweeps": 0}, weighting="plain")


def model_of(**changes):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_files_are_as_small_as_the_report_says(tmp_path):
    model = model_of(hidden_size=512, intermediate_size=512, head_dim=128, num_hidden_layers=1)
    report = pbsp.compress(model, None, FAST, corpus=WINDOWS)
    pbsp.save_compressed(model, None, tmp_path / "out", report)
    weights = sum(layer.weights for layer in report.layers)
    found = inspect_folder(tmp_path / "out")
    left = sum(found.bytes_by_kind[kind] for kind in ("embeddings and head", "norms and biases"))
    promised = report.stored_bits * weights / 8 + left
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 1.02 * promised
    assert report.stored_bits < 2


@pytest.mark.parametrize("patterns", ["4:8", "2:8+1:8"])
def test_odd_rows_keep_exactly_n_of_every_m_with_finite_scales(patterns):
    weight, moment = layer_problem(rows=6, columns=64)
    weight[0] = 0
    weight[1] = 0.25  # all ties
    weight[2] = -1
    weight[3] = 0
    weight[3, 7] = 1e4
    weight[4] = weight[4].sign()
    planes = PlaneFit(parse_patterns(patterns), block=32).compress(weight, moment)
    assert torch.isfinite(planes.scales).all()
    for signs, pattern in zip(planes.signs, planes.patterns, strict=True):
        kept = (signs.view(6, -1, pattern.group) != 0).sum(-1)
        assert (kept == pattern.kept).all()
    assert torch.isfinite(planes.dense()).all()
    dense = planes.rotated()
    most = sum(pattern.kept for pattern in planes.patterns)
    assert ((dense.view(6, -1, 8) != 0).sum(-1) <= most).all()  # none that was pruned came back
    assert dense[0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(1, 96, 128), (1, 136, 128), (5, 8, 128), (3, 264, 128)]
)
def test_rows_shorter_than_a_block_and_last_blocks_cut_off_are_solved(rows, columns, block):
    weight, moment = layer_problem(rows=rows, columns=columns)
    planes = PlaneFit(parse_patterns("4:8"), block=block).compress(weight, moment)
    assert planes.dense().shape == (rows, columns)
    residual = weight - planes.dense()
    assert float(((residual @ moment) * residual).sum()) < 0.6 * float(((weight @ moment) * weight).sum())


@pytest.mark.parametrize("name", ["opt", "qwen2"])
@torch.no_grad()
def test_large_biases_reach_the_output(name):
    model = tiny_model(name)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n}
    for bias in biases.values():
        bias.normal_(std=10)
    expected = {n: bias.clone() for n, bias in biases.items()}
    pbsp.compress(model, None, FAST, corpus=WINDOWS)
    found = packed_linears(model)
    assert found
    for layer, module in found.items():
        if module.bias is not None:
            torch.testing.assert_close(module.bias.float(), expected[f"{layer}.bias"], rtol=1e-3, atol=1e-3)
            x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
            dense = x @ module.dense().T + module.bias.float()
            assert float((module(x.to(model.dtype)).float() - dense).norm() / dense.norm()) < 0.02


def test_nothing_depends_on_a_folders_name_or_on_optional_files(tmp_path):
    source, out = tmp_path / "mymodel-gpt2", tmp_path / "opt-gptq-4bit"
    tiny_model().save_pretrained(source)
    (source / "generation_config.json").unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(source)
    loaded = load_model(str(source))
    report = pbsp.compress(loaded.model, loaded.tokenizer, FAST, corpus=WINDOWS)
    pbsp.save_compressed(loaded.model, loaded.tokenizer, out, report)
    assert type(load_model(str(out)).model).__name__ == "LlamaForCausalLM"
    kept = AutoTokenizer.from_pretrained(out)
    assert kept.apply_chat_template([{"content": "a"}], tokenize=False) == "<a>"


def test_a_source_without_a_tokenizer_is_compressed_on_its_own_text(tmp_path):
    tiny_model().save_pretrained(tmp_path / "source")
    loaded = load_model(str(tmp_path / "source"))
    sampled = pbsp.corpus("self", samples=1, context=16)
    report = pbsp.compress(loaded.model, None, FAST, corpus=sampled)
    pbsp.save_compressed(loaded.model, None, tmp_path / "out", report)
    assert load_model(str(tmp_path / "out")).tokenizer is None


def test_an_unknown_architecture_is_refused_in_a_line(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mymodel"}))
    with pytest.raises(ModelError, match="mymodel") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", [False, True])
def test_no_temporary_file_is_left(tmp_path, monkeypatch, failing):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    model = tiny_model()
    if failing:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
        with pytest.raises(ModelError):
            pbsp.compress(model, None, FAST, corpus=WINDOWS)
    else:
        report = pbsp.compress(model, None, FAST, corpus=WINDOWS)
        pbsp.save_compressed(model, None, tmp_path / "out", report)
    assert not list((tmp_path / "tmp").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == ({"tmp"} if failing else {"tmp", "out"})


def test_every_test_that_the_page_names_exists():
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py|…)(?:::(\w+))?`", page)
    assert len(named) > 60
    file = ""
    for path, name in named:
        file = file if path == "…" else path
        found = next(iter(tests.glob(f"**/{file}")), None)
        assert found, file
        assert f"def {name}(" in found.read_text(encoding="utf-8") or not name, f"{file}::{name}"


MEMORY = """
import sys, torch, pbsp
from transformers import AutoModelForCausalLM, LlamaConfig
from pbsp.calibration.windows import Windows
from pbsp.resources import peak_rss_bytes
config = LlamaConfig(vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=40,
                     num_attention_heads=8, num_key_value_heads=8)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
windows = Windows(tokens, text="random", split="test", text_digest="0")
before = peak_rss_bytes()
pbsp.compress(model, None, pbsp.Config(pattern="4:8", options={"sweeps": 0}), corpus=windows)
print(peak_rss_bytes() - before, sum(p.numel() * 4 for p in model.parameters()), before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks():
    """40 blocks of 10.5 MB each, 420 MB in all: the peak grows by some blocks, their moments and copies."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    grown = int(result.stdout.split()[0])
    assert grown < 150e6, result.stdout
