import pytest
import torch

from pbsp.binarization.rotation import unrotate
from pbsp.errors import FormatError
from pbsp.packed_linear import PackedLinear
from pbsp.quantization.rows import QuantizedRows, quantize_rows
from pbsp.storage.checkpoint import LayerEntry, packed_digest
from pbsp.storage.layouts import pack
from pbsp.storage.rows import RowsForm


def rows_of(bits, rows=7, columns=96, rotation=16):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return QuantizedRows(quantize_rows(weight, bits), bits, rotation)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_byte(bits):
    rows = rows_of(bits)
    packed = pack(rows)
    assert packed.form == RowsForm(bits, 96, 7, 16)
    assert torch.equal(packed.unpack().packed, rows.packed)
    assert torch.equal(unrotate(packed.decode(), 16), rows.dense())
    assert torch.equal(packed.rows(2, 5).decode(), packed.decode()[2:5])
    packed.check()


@pytest.mark.parametrize("bits", [4, 8])
def test_split_and_join_are_inverse_and_copy(bits):
    rows = rows_of(bits)
    parts = rows.split([1, 4, 2])
    torch.testing.assert_close(parts[1].dense(), rows.dense()[1:5])
    assert torch.equal(QuantizedRows.join(parts).packed, rows.packed)
    parts[0].packed.zero_()
    assert rows.packed[0].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_entry_survives_json(bits):
    packed = pack(rows_of(bits))
    entry = LayerEntry(packed.form, False, packed_digest(packed))
    assert LayerEntry.from_dict("a", entry.to_dict()) == entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "layer a: rows of 96 weights have no 5-bit form"),
        ({"in_features": 48}, "layer a: rows of 48 weights have no 4-bit form"),
        ({"rotation": 64}, "layer a: rows of 96 weights have no rotation of size 64"),
        (
            {"patterns": "4:8"},
            "must have exactly the keys layout, bits, in_features, out_features, rotation, bias",
        ),
    ],
)
def test_a_wrong_entry_is_refused(change, message):
    packed = pack(rows_of(4))
    entry = LayerEntry(packed.form, False, packed_digest(packed)).to_dict()
    with pytest.raises(FormatError, match=message):
        LayerEntry.from_dict("a", {**entry, **change})


@pytest.mark.parametrize(("bits", "place"), [(4, 17), (4, 53), (8, 97)])
def test_an_infinite_scale_is_refused(bits, place):
    packed = pack(rows_of(bits))
    packed.codes[3, place - 1 : place + 1] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    with pytest.raises(FormatError, match="a scale is not a finite number"):
        packed.check()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_dense_ones(bits, count, dtype):
    linear = PackedLinear.of(rows_of(bits), torch.randn(7, generator=torch.Generator().manual_seed(1)))
    linear.to(dtype)
    x = torch.randn(2, count, 96, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    exact = x.detach().double() @ linear.dense(torch.float64).T + linear.bias.detach().double()
    y = linear(x)
    assert y.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=bound, atol=bound * float(exact.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(linear(x), y, rtol=bound, atol=bound * float(exact.abs().max()))
    y.sum().backward()
    dense = linear.dense(torch.float64).sum(0).expand(2, count, -1)
    torch.testing.assert_close(x.grad.double(), dense, rtol=bound, atol=bound)
