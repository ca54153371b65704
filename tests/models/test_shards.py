import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbsp.errors import ModelError
from pbsp.models.experts import split_experts
from pbsp.models.load import load_model
from pbsp.models.precision import check_finite, storage_dtype, weights_digest
from pbsp.models.shards import OUTSIDE, resident, shards_of
from tiny import CONFIGS, tiny_model


def in_blocks(folder, name="llama", **saving):
    tiny_model(name).save_pretrained(folder, **saving)
    return load_model(str(folder), memory="blocks").model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_has_the_values_of_the_model_in_memory(name, tmp_path):
    model = in_blocks(tmp_path, name, max_shard_size="100KB")
    expected = load_model(str(tmp_path)).model
    split_experts(expected)
    shards = shards_of(model)
    assert len(shards.parts) == 3
    seen = set()
    for part in shards.parts:
        with resident(model, part):
            for key, tensor in model.state_dict().items():
                assert tensor.is_meta == (shards.part_of(key) != part)
                if not tensor.is_meta:
                    seen.add(key)
                    assert torch.equal(tensor, expected.state_dict()[key]), key
    assert seen == expected.state_dict().keys()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    for key, buffer in expected.named_non_persistent_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nested_contexts_read_a_part_once(tmp_path):
    model = in_blocks(tmp_path)
    with resident(model, "model.layers.0"):
        weight = model.model.layers[0].mlp.up_proj.weight
        with resident(model, "model.layers.0"):
            assert model.model.layers[0].mlp.up_proj.weight is weight
        assert model.model.layers[0].mlp.up_proj.weight is weight
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


def test_tied_weights_are_one_tensor_in_memory_and_outside(tmp_path):
    model = in_blocks(tmp_path)
    for _ in range(2):
        with resident(model, OUTSIDE):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_head_in_the_file_is_tied_only_where_it_is_the_embedding(factor, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = load_model(str(tmp_path)).model
    model = load_model(str(tmp_path), memory="blocks").model
    with resident(model, OUTSIDE):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (factor == 1)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert model.all_tied_weights_keys == expected.all_tied_weights_keys


def test_a_survey_says_what_a_look_at_the_whole_model_does(tmp_path):
    model = in_blocks(tmp_path, "llama-untied")
    expected = tiny_model("llama-untied")
    check_finite(model)
    assert weights_digest(model) == weights_digest(expected)
    assert storage_dtype(model, "auto") == storage_dtype(expected, "auto") == torch.float16


def test_a_weight_that_is_not_finite_names_its_layer(tmp_path):
    source = tiny_model()
    source.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    source.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), memory="blocks").model
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.up_proj: 1 of 8192 weights"):
        check_finite(model)


def test_bin_files_are_refused_in_a_line(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\.bin weights, which cannot be read block by block; .* whole"):
        load_model(str(tmp_path), memory="blocks")


def test_a_missing_tensor_is_named_before_any_work(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path), memory="blocks")


def test_a_file_that_is_lost_on_the_way_is_an_error_in_a_line(tmp_path):
    model = in_blocks(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / index["weight_map"]["model.layers.1.mlp.up_proj.weight"]).unlink()
    with pytest.raises(ModelError, match=r"the weights of model\.layers\.1 cannot be read"):
        shards_of(model).keep("model.layers.1")


def test_a_weight_that_two_blocks_share_is_refused(tmp_path, monkeypatch):
    tied = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.get_expanded_tied_weights_keys", lambda *args, **named: dict(tied)
    )
    with pytest.raises(ModelError, match=r"layers\.1\..* shares its weight with .*; use --memory whole"):
        load_model(str(tmp_path), memory="blocks")
