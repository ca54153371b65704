import json

import pytest
import torch

from pbsp.cli import main
from pbsp.errors import ConfigError, CorpusError
from pbsp.evaluation.speed import measure_speed, token_bytes
from random_planes import packed_model
from tiny import tiny_model

SIZES = ["--prompt-tokens", "6", "--new-tokens", "3", "--runs", "2"]


@pytest.fixture
def packed(tmp_path):
    packed_model("llama", "4:8").save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_speed_counts_what_it_timed(name):
    model = tiny_model(name)
    speed = measure_speed(model, bandwidth=1e9, prompt_tokens=6, new_tokens=3, runs=2)
    assert (speed.prompt_tokens, speed.new_tokens, speed.runs) == (6, 3, 2)
    assert speed.dtype == "float32"
    assert speed.prompt_tokens_per_second == pytest.approx(6 / speed.first_token_seconds)
    assert speed.decode_tokens_per_second > 0
    assert speed.bandwidth_share == pytest.approx(
        speed.bytes_per_token * speed.decode_tokens_per_second / 1e9
    )
    assert speed.peak_bytes > speed.model_bytes
    assert speed.model_bytes >= sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_a_token_reads_all_matrices_and_one_row_of_the_embedding(name):
    model = tiny_model(name)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    others = sum(
        parameter.nbytes
        for parameter in model.parameters()
        if parameter is not embedding and parameter is not head
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert token_bytes(model) == others + buffers + head.nbytes + embedding[0].nbytes


def test_packed_linears_are_counted_as_they_are_held():
    model = packed_model("llama", "4:8")
    dense = tiny_model("llama")
    saved = token_bytes(dense) - token_bytes(model)
    weights = sum(
        module.weight.numel()
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert 30 * weights < 8 * saved < 31.5 * weights


def test_numbers_out_of_range_are_refused():
    model = tiny_model()
    with pytest.raises(ConfigError, match="new_tokens is 0"):
        measure_speed(model, bandwidth=1e9, new_tokens=0)
    with pytest.raises(CorpusError, match="129 tokens do not fit"):
        measure_speed(model, bandwidth=1e9, prompt_tokens=125, new_tokens=3)


def test_bench_prints_a_table_and_json(packed, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "original")
    against = ["--against", str(tmp_path / "original")]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", packed, *against, *SIZES, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["kernels"].keys() == {"planes"}
    assert values["activations"] == "int16"
    assert values["original"].keys() == {"float32", "bfloat16"}
    for dtype, original in values["original"].items():
        assert original["dtype"] == dtype
        ratio = values["decode_tokens_per_second"] / original["decode_tokens_per_second"]
        assert original["decode_ratio"] == pytest.approx(ratio)
        assert original["bytes_per_token"] > values["bytes_per_token"]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", packed, *SIZES])
    printed = " ".join(capsys.readouterr().out.split())
    assert "layout planes on" in printed
    assert "memory reads" in printed


def test_bench_refuses_bad_numbers_before_loading(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "nowhere", "--runs", "0"])
    assert capsys.readouterr().err == "pbsp: runs is 0; it must be at least 1\n"
