import struct

import pytest
import torch

from pbsp.binarization.low_rank import LowRankBinary
from pbsp.errors import FormatError
from pbsp.packed_linear import PackedLinear
from pbsp.storage.bits import stored_bits
from pbsp.storage.checkpoint import LayerEntry, packed_digest
from pbsp.storage.layouts import pack
from pbsp.storage.low_rank import LowRankForm
from random_low_rank import random_low_rank

SHAPES = [(1, 1, 1), (5, 9, 8), (9, 5, 13)]


def rebuilt(packed):
    """The matrix, weight by weight, from the bytes as docs/format.md explains them."""
    rows, columns, rank = packed.form.out_features, packed.form.in_features, packed.form.rank
    stored = {name: tensor.numpy().tobytes() for name, tensor in packed.tensors().items()}
    width = -(-rank // 8)

    def sign(name, row, place):
        return 1 if stored[name][row * width + place // 8] >> place % 8 & 1 else -1

    def scale(name, place):
        return struct.unpack_from("<e", stored[name], 2 * place)[0]

    return [
        [
            scale("weight_row_scale", i)
            * sum(sign("weight", i, k) * sign("weight_column", j, k) for k in range(rank))
            * scale("weight_column_scale", j)
            for j in range(columns)
        ]
        for i in range(rows)
    ]


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_the_bytes_are_enough_to_rebuild_the_matrix_and_no_more(rows, columns, rank):
    matrix = random_low_rank(rows, columns, rank)
    packed = pack(matrix)
    packed.check()
    torch.testing.assert_close(torch.tensor(rebuilt(packed)), matrix.dense(), rtol=1e-6, atol=0)
    assert stored_bits(packed.tensors().values()) == (-(-rank // 8) * 8 + 16) * (rows + columns)
    assert packed.form.nominal_bits(packed.tensors().__getitem__) == matrix.nominal_bits


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_unpacking_gives_back_every_field(rows, columns, rank):
    matrix = random_low_rank(rows, columns, rank)
    packed = pack(matrix)
    found = packed.unpack()
    for field in ("row_signs", "column_signs", "row_scales", "column_scales"):
        assert torch.equal(getattr(found, field), getattr(matrix, field))
        assert getattr(found, field).dtype == getattr(matrix, field).dtype
    assert torch.equal(packed.decode(), matrix.dense())
    assert torch.equal(packed.rows(rows // 2, rows).decode(), matrix.dense()[rows // 2 :])


def test_the_entry_survives_json_and_a_wrong_one_is_refused():
    packed = pack(random_low_rank(5, 9, 8))
    entry = LayerEntry(packed.form, False, packed_digest(packed))
    assert LayerEntry.from_dict("a", entry.to_dict()) == entry
    assert entry.form == LowRankForm(8, 9, 5)
    with pytest.raises(FormatError, match="layer a: rank is 0; it must be from 1"):
        LayerEntry.from_dict("a", {**entry.to_dict(), "rank": 0})
    with pytest.raises(FormatError, match="exactly the keys layout, rank, in_features"):
        LayerEntry.from_dict("a", {**entry.to_dict(), "patterns": "4:8"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight", "weight has set bits in the padding"),
        ("weight_column", "weight_column has set bits in the padding"),
        ("weight_row_scale", "weight_row_scale holds a NaN"),
        ("weight_column_scale", "weight_column_scale holds a NaN"),
    ],
)
def test_bytes_without_meaning_are_refused(name, message):
    packed = pack(random_low_rank(9, 5, 13))
    tensor = packed.tensors()[name]
    tensor[-1] = 0x7C00 if tensor.dtype == torch.int16 else 255
    with pytest.raises(FormatError, match=message):
        packed.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_equal_the_dense_ones(dtype):
    matrix = random_low_rank(7, 40, 11)
    bias = torch.randn(7, generator=torch.Generator().manual_seed(1))
    linear = PackedLinear.of(matrix, bias).to(dtype)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    exact = x.detach().double() @ matrix.dense().double().T + linear.bias.detach().double()
    y = linear(x)
    assert y.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=bound, atol=bound * float(exact.abs().max()))
    y.float().sum().backward()
    slope = matrix.dense().double().sum(0).expand(2, 3, -1)
    torch.testing.assert_close(x.grad.double(), slope, rtol=bound, atol=bound * float(slope.abs().max()))


def test_rows_of_one_factorization_are_split_and_joined():
    matrix = random_low_rank(9, 5, 13)
    parts = matrix.split([2, 3, 4])
    joined = LowRankBinary.join(parts)
    assert torch.equal(pack(joined).codes, pack(matrix).codes)
