import struct

import pytest
import torch

from pbsp.packed_embedding import PackedEmbedding, PackedHead
from pbsp.quantization.rows import dequantize_rows, quantize_rows, row_bytes, width_for


def matrix(rows=40, columns=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp2()


def test_every_value_is_within_half_a_step():
    weight = matrix()
    steps = weight.abs().amax(1, keepdim=True) / 127 * (1 + 2**-10)
    assert ((dequantize_rows(quantize_rows(weight)) - weight).abs() <= steps / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1e-12, 6e-8, 1.0, 65504.0, 4e5])
def test_extreme_rows_stay_finite_and_near(value, bits):
    weight = torch.tensor([[value, -value, value / 2, 0.0] * 8])
    found = dequantize_rows(quantize_rows(weight, bits), bits)
    largest = {8: 127, 4: 7.5}[bits]
    assert torch.isfinite(found).all()
    assert ((found - weight).abs() <= max(value / largest, 2**-24 * largest)).all()


def nibbles(packed):
    """The values of 4-bit rows, one after the other."""
    rows = []
    for row in packed.tolist():
        values = []
        for start in range(0, len(row), 18):
            group = row[start : start + 18]
            scale = struct.unpack("<e", bytes(group[16:]))[0]
            codes = [byte % 16 for byte in group[:16]] + [byte // 16 for byte in group[:16]]
            values += [(code - 7.5) * scale for code in codes]
        rows.append(values)
    return torch.tensor(rows)


def test_nibbles_stand_for_what_the_format_says():
    packed = torch.randint(0, 256, (50, 54), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed[:, 17::18] &= 0x7B  # finite scales
    assert torch.equal(dequantize_rows(packed, 4), nibbles(packed))


def test_four_bits_take_the_best_shrink_and_the_nearest_codes():
    weight = matrix(40, 96)
    found = dequantize_rows(quantize_rows(weight, 4), 4)
    groups = weight.view(40, 3, 1, 32)
    shrinks = torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7])
    scales = (groups.abs().amax(3, keepdim=True) / 7.5 * shrinks[:, None]).half().double()
    levels = (torch.arange(16) - 7.5) * scales[..., None]
    least = (levels - groups[..., None].double()).square().amin(-1).sum(-1).amin(-1)
    errors = (found - weight).double().square().view(40, 3, 32).sum(-1)
    torch.testing.assert_close(errors, least, rtol=1e-5, atol=1e-9)


def test_rows_without_whole_groups_take_eight_bits():
    assert [width_for(columns, 4) for columns in (64, 48)] == [4, 8]
    assert (row_bytes(64, 4), row_bytes(64, 8)) == (36, 66)


def test_what_was_rounded_once_is_kept():
    packed = quantize_rows(matrix())
    assert torch.equal(quantize_rows(dequantize_rows(packed)), packed)


@pytest.mark.parametrize(("columns", "bits"), [(24, 8), (64, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_and_head_equal_their_dense_forms(dtype, columns, bits):
    embedding = PackedEmbedding(40, columns, dtype, bits=bits)
    head = PackedHead(40, columns, dtype, bits=bits)
    embedding.set_rows(quantize_rows(matrix(40, columns), bits))
    head.weight = embedding.weight
    tokens = torch.tensor([[0, 39, 7]])
    dense = embedding.dense(torch.float32)
    assert torch.equal(embedding(tokens), dense[tokens].to(dtype))
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ dense.double().T
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert (head(x).double() - exact).abs().max() <= bound * exact.abs().max()
    assert head(x).dtype == dtype


def test_moving_to_another_dtype_leaves_the_bytes_and_changes_the_output():
    embedding = PackedEmbedding(40, 24, torch.float32)
    embedding.set_rows(quantize_rows(matrix()))
    before = embedding.weight.clone()
    embedding.to(torch.bfloat16)
    assert torch.equal(embedding.weight, before)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16
