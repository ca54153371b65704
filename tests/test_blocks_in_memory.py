"""A model that is read block by block is compressed to the same bytes as one that is in memory as a whole."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.errors import ConfigError, CorpusError, ModelError, OutputError
from pbsp.models.load import load_model
from pbsp.unfinished import Unfinished
from tiny import CONFIGS, tiny_model, tiny_tokens

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


@pytest.mark.parametrize("name", CONFIGS)
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
        {"bits": 1.5},
        {"file_size": 55_000},
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


@pytest.mark.parametrize(
    ("first", "second"), [("blocks", "blocks"), ("whole", "blocks"), ("blocks", "whole")]
)
@pytest.mark.parametrize("settings", [{"bits": 1.5}, {"pattern": "2:8", "recover": "block"}], ids=str)
def test_a_run_goes_on_either_way(first, second, settings, tmp_path):
    source = source_of("mixtral", tmp_path / "source")
    run(source, tmp_path / "whole", "whole", **settings)
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", first, stop_before=1, kept=tmp_path / "kept", **settings)
    run(source, tmp_path / "out", second, kept=tmp_path / "kept", **settings)
    assert same(tmp_path / "whole", tmp_path / "out")


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
