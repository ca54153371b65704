"""A model that is read block by block is compressed to the same bytes as one that is in memory as a whole."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.cli import main
from pbsp.config import Config
from pbsp.errors import ConfigError, CorpusError, ModelError, OutputError
from pbsp.models.load import load_model
from pbsp.unfinished import Unfinished
from tiny import CONFIGS, FAMILIES, tiny_model, tiny_tokenizer, tiny_tokens

WINDOWS = Windows(tiny_tokens(4, 32), text="random", split="test", text_digest="0")


class Stopped(Exception):  # noqa: N818
    """Stands for a crash."""


def run(source, out, memory, *, stop_before=None, kept=None, **settings):
    def progress(stage, done, total):
        if stage == "compress" and done == stop_before:
            raise Stopped

    model = load_model(str(source), memory=memory).model
    unfinished = Unfinished(kept or out.with_name(f"{out.name}.unfinished"))
    report = pbsp.compress(
        model, None, Config(**settings), corpus=WINDOWS, progress=progress, unfinished=unfinished
    )
    pbsp.save_compressed(model, None, out, report, unfinished=unfinished)
    unfinished.remove()
    return report


def same(left, right):
    """Whether both folders hold the same, but for times."""
    for file in left.iterdir():
        if file.name != "pbsp_report.json":
            assert file.read_bytes() == (right / file.name).read_bytes(), file.name
    return {file.name for file in left.iterdir()} == {file.name for file in right.iterdir()}


def source_of(name, folder, *, dtype=torch.float32, **saving):
    tiny_model(name).to(dtype).save_pretrained(folder, **saving)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_both_ways_give_the_same_bytes(name, tmp_path):
    source = source_of(name, tmp_path / "source", max_shard_size="100KB")
    whole = run(source, tmp_path / "whole", "whole", pattern="4:8")
    blocks = run(source, tmp_path / "blocks", "blocks", pattern="4:8")
    assert same(tmp_path / "whole", tmp_path / "blocks")
    assert (whole.layers, whole.memory, blocks.memory) == (blocks.layers, "whole", "blocks")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "blocks")
    with torch.no_grad():
        assert torch.isfinite(loaded(tiny_tokens(1)).logits).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1.5, "trial": False},
        {"file_size": 55_000, "embeddings": "8", "trial": False},
        {"pattern": "4:8", "weighting": "gradient"},
        {"pattern": "4:8", "inputs": "original"},
        {"pattern": "2:8", "recover": "block"},
        {"method": "pbsp", "pattern": "4:8", "allocation": "paper"},
        {"method": "stbllm", "pattern": "4:8"},
        {"pattern": "4:8", "allocation": "outliers", "embeddings": "8"},
    ],
    ids=str,
)
def test_every_pass_over_the_model_reads_it_block_by_block(settings, tmp_path):
    source = source_of("llama", tmp_path / "source", dtype=torch.bfloat16)
    run(source, tmp_path / "whole", "whole", **settings)
    run(source, tmp_path / "blocks", "blocks", **settings)
    assert same(tmp_path / "whole", tmp_path / "blocks")


@pytest.fixture(
    scope="module", params=[{"bits": 1.5, "trial": False}, {"pattern": "2:8", "recover": "block"}], ids=str
)
def uninterrupted(request, tmp_path_factory):
    """Settings, a source, and what a run in memory as a whole makes of it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = source_of("mixtral", folder / "source")
    run(source, folder / "whole", "whole", **request.param)
    return request.param, source, folder / "whole"


@pytest.mark.parametrize(
    ("first", "second"), [("blocks", "blocks"), ("whole", "blocks"), ("blocks", "whole")]
)
def test_a_run_goes_on_either_way(first, second, uninterrupted, tmp_path):
    settings, source, whole = uninterrupted
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", first, stop_before=1, kept=tmp_path / "kept", **settings)
    run(source, tmp_path / "out", second, kept=tmp_path / "kept", **settings)
    assert same(whole, tmp_path / "out")


def test_linears_that_do_not_tile_are_written_as_they_are(tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama-untied"])
    config.intermediate_size = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    report = run(tmp_path / "source", tmp_path / "whole", "whole", pattern="4:8")
    run(tmp_path / "source", tmp_path / "blocks", "blocks", pattern="4:8")
    assert report.left_uncompressed
    assert same(tmp_path / "whole", tmp_path / "blocks")


def test_one_block_is_in_memory_at_a_time_and_none_at_the_end(tmp_path):
    model = load_model(str(source_of("llama", tmp_path / "source")), memory="blocks").model
    found = []

    def progress(stage, done, total):
        found.append([not block.mlp.up_proj.weight.is_meta for block in model.model.layers])

    def watch(module, args, output):
        found.append([not block.mlp.up_proj.weight.is_meta for block in model.model.layers])

    for block in model.model.layers:
        block.register_forward_hook(watch)
    unfinished = Unfinished(tmp_path / "kept")
    pbsp.compress(model, None, Config(bits=1.5), corpus=WINDOWS, progress=progress, unfinished=unfinished)
    assert max(map(sum, found)) == 1
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert not model.model.embed_tokens.weight.is_meta
    with pytest.raises(OutputError, match="read block by block; pass the `unfinished`"):
        pbsp.save_compressed(model, None, tmp_path / "out", _packed_report())


def _packed_report():
    model = tiny_model()
    return pbsp.compress(model, None, Config(pattern="4:8"), corpus=WINDOWS)


def test_what_cannot_be_read_block_by_block_is_refused_in_a_line(tmp_path):
    source = source_of("llama", tmp_path / "source")
    model = load_model(str(source), memory="blocks").model
    with pytest.raises(ConfigError, match="needs a folder for its finished blocks"):
        pbsp.compress(model, None, Config(pattern="4:8"), corpus=WINDOWS)
    unfinished = Unfinished(tmp_path / "kept")
    with pytest.raises(ConfigError, match="method rtn has no packed layout"):
        pbsp.compress(model, None, Config.parse("rtn"), corpus=WINDOWS, unfinished=unfinished)
    with pytest.raises(CorpusError, match=r"`self` cannot be sampled .* --memory whole"):
        pbsp.compress(
            model, None, Config(pattern="4:8"), corpus=pbsp.corpus("self", context=32), unfinished=unfinished
        )
    with pytest.raises(ConfigError, match="memory 'half' is unknown; choose auto, whole, blocks"):
        load_model(str(source), memory="half")
    run(source, tmp_path / "out", "whole", pattern="4:8")
    with pytest.raises(ModelError, match="already"):
        load_model(str(tmp_path / "out"), memory="blocks")


def command(capsys, *arguments):
    """Exit code, stdout and stderr of `pbsp compress`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compress", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_the_command_goes_block_by_block_by_itself_where_memory_is_short(tmp_path, capsys, monkeypatch):
    source = source_of("llama", tmp_path / "source")
    tiny_tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    text = ["--calibration", tmp_path / "text.txt", "--samples", "2", "--context", "16", "--pattern", "4:8"]
    code, output, _ = command(capsys, source, "-o", tmp_path / "whole", *text)
    assert code == 0
    assert "model in memory as a whole" in output
    monkeypatch.setattr("pbsp.models.memory.free_bytes", lambda device: 200_000)
    code, output, _ = command(capsys, source, "-o", tmp_path / "blocks", *text)
    assert code == 0
    assert "2 blocks, " in output
    assert "model read block by block" in output
    assert same(tmp_path / "whole", tmp_path / "blocks")
    code, output, _ = command(capsys, source, "-o", tmp_path / "third", *text, "--memory", "whole", "--json")
    assert json.loads(output)["memory"] == "whole"
    assert [block["name"] for block in json.loads(output)["blocks"]] == ["model.layers.0", "model.layers.1"]
    code, output, _ = command(capsys, source, *text, "--dry-run", "--json")
    assert code == 0
    needed = json.loads(output)["memory_bytes"]
    monkeypatch.undo()
    _, output, _ = command(capsys, source, *text, "--dry-run", "--json")
    assert needed < json.loads(output)["memory_bytes"]
    kept = {"source", "text.txt", "whole", "blocks", "third"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_command_refuses_in_a_line_and_leaves_nothing(tmp_path, capsys):
    source = source_of("llama", tmp_path / "source")
    arguments = [source, "-o", tmp_path / "out", "--memory", "blocks", "--samples", "2", "--context", "16"]
    code, _, errors = command(capsys, *arguments, "--calibration", "self")
    assert (code, errors.count("\n")) == (2, 1)
    assert "`self` cannot be sampled" in errors
    code, _, errors = command(capsys, source, "-o", tmp_path / "out", "--memory", "disk")
    assert (code, "memory 'disk' is unknown" in errors) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MEMORY = """
import sys, torch, pbsp
from pathlib import Path
from pbsp.calibration.windows import Windows
from pbsp.resources import peak_rss_bytes
model = pbsp.load_model(sys.argv[1], memory="blocks").model
tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
windows = Windows(tokens, text="random", split="test", text_digest="0")
unfinished = pbsp.Unfinished(Path(sys.argv[2]))
before = peak_rss_bytes()
config = pbsp.Config(pattern="1:8", options={"sweeps": 0}, weighting="plain")
report = pbsp.compress(model, None, config, corpus=windows, unfinished=unfinished)
pbsp.save_compressed(model, None, sys.argv[2] + ".out", report, unfinished=unfinished)
print(peak_rss_bytes() - before, before)
"""


@pytest.mark.slow
def test_the_peak_is_that_of_a_block_whatever_the_models_size(tmp_path):
    """40 blocks of 10.5 MB in float32, 420 MB in all."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=40, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "source"), str(tmp_path / "kept")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[0]) < 150e6, result.stdout
