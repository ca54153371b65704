import pytest
import torch

from pbsp.errors import FormatError
from pbsp.kernels import reference
from pbsp.kernels.reference import decode_dense, packed_linear
from pbsp.packed_linear import PackedLinear
from pbsp.storage.planes import pack_planes
from random_grouped import random_grouped
from random_planes import random_planes


@pytest.mark.parametrize("text", ["4:8", "4:8+2:8", "2:16+1:4+4:8+8:16"])
@pytest.mark.parametrize("scale_block", [1, 16, 24, 47, 48, 60])
def test_decoded_rows_equal_the_planes_bit_for_bit(text, scale_block):
    planes = random_planes(text, 7, 48, scale_block=scale_block)
    assert torch.equal(pack_planes(planes).decode(), planes.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile_weights", [1, 48 * 3, 1 << 22])
def test_product_equals_that_with_the_dense_matrix(monkeypatch, dtype, tile_weights):
    monkeypatch.setattr(reference, "_TILE_WEIGHTS", tile_weights)
    planes = random_planes("4:8+2:8", 7, 48)
    x = torch.randn(2, 3, 48).to(dtype)
    bias = torch.randn(7).to(dtype)
    weight = planes.dense().to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    product = packed_linear(x, pack_planes(planes), bias)
    assert product.dtype == dtype
    assert product.shape == (2, 3, 7)
    naive_error = (x @ weight.T + bias - exact).abs().max()
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (product - exact).abs().max() <= 2 * max(naive_error, rounding)
    assert torch.equal(decode_dense(pack_planes(planes), dtype), weight)


def test_gradients_reach_the_input_and_the_bias():
    planes = random_planes("4:8", 7, 48)
    x = torch.randn(2, 48, requires_grad=True)
    linear = PackedLinear.of(planes, torch.nn.Parameter(torch.zeros(7)))
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, planes.dense().sum(0).expand(2, -1))
    torch.testing.assert_close(linear.bias.grad, torch.full((7,), 2.0))
    assert linear.weight.grad is None


def test_packed_linear_keeps_its_bytes_through_dtype_changes():
    linear = PackedLinear.of(random_planes("4:8+2:8", 7, 48), torch.randn(7))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    linear.to(torch.bfloat16).half()
    for name in ("weight", "weight_scale", "weight_scale_offset"):
        assert torch.equal(linear.state_dict()[name], before[name])
        assert linear.state_dict()[name].dtype == before[name].dtype
    assert linear.bias.dtype == torch.float16
    assert list(linear.state_dict()) == ["weight", "bias", "weight_scale", "weight_scale_offset"]


def test_packed_linear_does_not_share_the_bias_it_was_given():
    bias = torch.zeros(7)
    linear = PackedLinear.of(random_planes("4:8", 7, 48), bias)
    bias += 1
    assert not linear.bias.any()


def test_packed_linear_shows_what_it_holds():
    linear = PackedLinear.of(random_planes("4:8+2:8", 7, 48))
    assert repr(linear) == (
        "PackedLinear(in_features=48, out_features=7, 4:8+2:8, layout=planes, bias=False)"
    )
    assert torch.equal(linear.dense(), random_planes("4:8+2:8", 7, 48).dense())


def test_rows_whose_packed_shape_equals_the_dense_one_are_refused():
    with pytest.raises(FormatError, match="rows of 8 weights"):
        PackedLinear.of(random_planes("4:8+4:8+4:8+4:8", 3, 8))


def test_first_use_in_inference_mode_leaves_later_training_alone():
    planes = random_planes("3:6", 7, 48)
    linear = PackedLinear.of(planes)
    with torch.inference_mode():
        linear(torch.randn(1, 48))
    x = torch.randn(1, 48, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_weights", [1, 48 * 4, 1 << 22])
@pytest.mark.parametrize("parts", [1, 3])
def test_layout_paper_computes_as_its_dense_matrix_whatever_the_tiles(
    monkeypatch, dtype, tile_weights, parts
):
    matrix = random_grouped("4:8", 9, 48, block=20, parts=parts)
    bias = torch.randn(9).to(dtype)
    linear = PackedLinear.of(matrix, bias)
    x = torch.randn(2, 48).to(dtype)
    whole = linear(x)
    monkeypatch.setattr(reference, "_TILE_WEIGHTS", tile_weights)
    assert torch.equal(linear.dense(), matrix.dense())
    assert torch.equal(linear.dense(dtype), matrix.dense().to(dtype))
    exact = (x.double() @ matrix.dense().to(dtype).double().T + bias.double()).float()
    tolerance = 4 * torch.finfo(dtype).eps
    for product in (whole, linear(x)):
        torch.testing.assert_close(product.float(), exact, rtol=tolerance, atol=tolerance)


def test_layout_paper_keeps_its_bytes_through_dtype_changes():
    linear = PackedLinear.of(random_grouped("4:8", 6, 48), torch.randn(6))
    before = {name: tensor.clone() for name, tensor in linear.packed.tensors().items()}
    linear.to(torch.bfloat16).half()
    assert linear.bias.dtype == torch.float16
    for name, tensor in linear.packed.tensors().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    assert "4:8, layout=paper, bias=True" in repr(linear)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 40])
def test_rotated_planes_multiply_as_their_dense_matrix(dtype, count):
    planes = random_planes("4:8+2:8", 7, 96, rotation=16)
    linear = PackedLinear.of(planes, torch.randn(7, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(linear.dense(), planes.dense())
    assert torch.equal(linear.dense(torch.float16), planes.dense().half())
    linear.to(dtype)
    x = torch.randn(count, 96, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    exact = x.detach().double() @ planes.dense().double().T + linear.bias.detach().double()
    y = linear(x)
    assert y.dtype == dtype
    bound = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=bound, atol=bound)
    y.sum().backward()
    expected = planes.dense().double().sum(0).expand(count, -1)
    torch.testing.assert_close(x.grad.double(), expected, rtol=bound, atol=bound)
