import pytest
import torch

from pbsp.packed_embedding import PackedEmbedding, PackedHead
from pbsp.quantization.rows import dequantize_rows, quantize_rows


def matrix(rows=40, columns=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp2()


def test_every_value_is_within_half_a_step():
    weight = matrix()
    steps = weight.abs().amax(1, keepdim=True) / 127 * (1 + 2**-10)
    assert ((dequantize_rows(quantize_rows(weight)) - weight).abs() <= steps / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("value", [0.0, 1e-12, 6e-8, 1.0, 65504.0, 8e6])
def test_extreme_rows_stay_finite_and_near(value):
    weight = torch.tensor([[value, -value, value / 2]])
    found = dequantize_rows(quantize_rows(weight))
    assert torch.isfinite(found).all()
    assert ((found - weight).abs() <= max(value / 127, 2**-24 * 127)).all()


def test_what_was_rounded_once_is_kept():
    packed = quantize_rows(matrix())
    assert torch.equal(quantize_rows(dequantize_rows(packed)), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_and_head_equal_their_dense_forms(dtype):
    embedding, head = PackedEmbedding(40, 24, dtype), PackedHead(40, 24, dtype)
    embedding.set_dense(matrix())
    head.weight = embedding.weight
    tokens = torch.tensor([[0, 39, 7]])
    dense = embedding.dense(torch.float32)
    assert torch.equal(embedding(tokens), dense[tokens].to(dtype))
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ dense.double().T
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert (head(x).double() - exact).abs().max() <= bound * exact.abs().max()
    assert head(x).dtype == dtype


def test_moving_to_another_dtype_leaves_the_bytes_and_changes_the_output():
    embedding = PackedEmbedding(40, 24, torch.float32)
    embedding.set_dense(matrix())
    before = embedding.weight.clone()
    embedding.to(torch.bfloat16)
    assert torch.equal(embedding.weight, before)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16
