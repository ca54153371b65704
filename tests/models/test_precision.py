import pytest
import torch

from pbsp.errors import ConfigError, ModelError
from pbsp.models.precision import cast_stored, check_finite, storage_dtype
from tiny import tiny_model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted_and_located(value):
    model = tiny_model()
    check_finite(model)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, :2] = value
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.up_proj: 2 of 8192 weights"):
        check_finite(model)


def test_norms_and_embeddings_are_checked_too():
    model = tiny_model()
    model.get_submodule("model.norm").weight.data[5] = torch.nan
    with pytest.raises(ModelError, match=r"^model\.norm: 1 of 64"):
        check_finite(model)


@pytest.mark.parametrize(
    ("source", "requested", "expected"),
    [
        (torch.float32, "auto", torch.float16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_storage_is_16_bit_and_auto_keeps_a_16_bit_type(source, requested, expected):
    assert storage_dtype(tiny_model().to(source), requested) == expected


def test_a_weight_out_of_float16s_range_needs_bfloat16():
    model = tiny_model()
    model.get_submodule("model.embed_tokens").weight.data[1, 2] = -65504.0
    assert storage_dtype(model, "auto") == torch.float16
    model.get_submodule("model.embed_tokens").weight.data[1, 2] = -1e5
    assert storage_dtype(model, "auto") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"cannot hold a weight of 1e\+05; choose bfloat16"):
        storage_dtype(model, "float16")


def test_cast_reaches_what_is_saved_and_leaves_rotary_frequencies():
    model = tiny_model()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_stored(model, torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.config.dtype == torch.float16
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.dtype == buffers[name].dtype


def test_cast_leaves_integers_alone():
    model = tiny_model()
    model.register_buffer("codes", torch.arange(3, dtype=torch.uint8))
    cast_stored(model, torch.bfloat16)
    assert model.codes.tolist() == [0, 1, 2]
    assert model.codes.dtype == torch.uint8
