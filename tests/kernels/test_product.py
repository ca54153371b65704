"""Every compiled path against float64 products with the decoded matrix."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pbsp import compiled
from pbsp.kernels import product
from pbsp.kernels.product import planes_linear
from pbsp.kernels.runtime import RuntimePlanes
from pbsp.packed_linear import PackedLinear
from pbsp.storage.planes import pack_planes
from random_planes import random_planes

pytestmark = pytest.mark.skipif(not compiled.loaded(), reason="pbsp was installed without a compiler")
RUNNABLE = [
    name for name in compiled.KERNELS if compiled.loaded() and compiled.library().pbsp_supports(name.encode())
]
PATTERNS = [
    "2:16",
    "1:4",
    "2:8",
    "4:16",
    "8:8",
    "3:8",
    "4:8",
    "5:8",
    "8:16",
    "3:6",
    "4:8+2:8",
    "2:16+8:8+1:4+4:8",
    "3 bit",
    "e8-8",
    "e8-12+e8-8",
    "e8-10+4:8",
]


def runtime(text, rows, columns, *, scale_block=48):
    planes = random_planes(text, rows, columns, scale_block=scale_block)
    return RuntimePlanes.of(pack_planes(planes)), planes.dense()


def exact_product(x, weight, bias=None):
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def assert_twice_naive(y, x, weight, bias=None):
    exact = exact_product(x, weight, bias)
    naive = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    # A few products may come out exact by luck: half a step of the result is no error.
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max()
    assert (y - exact).abs().max() <= 2 * max((naive - exact).abs().max(), rounding)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("text", PATTERNS)
def test_few_rows_are_as_exact_as_a_dense_product(kernel, name, text):
    kernel(name, "float")
    for columns, scale_block in (
        (48, 48),
        (96, 20),
        (192, 64),
        (576 if text != "3:6" else 570, 128),
        (1536, 192),
    ):
        planes, weight = runtime(text, 96, columns, scale_block=scale_block)
        for x_rows in (1, 2, 3, 4, 5, 8):
            x = torch.randn(x_rows, columns, generator=torch.Generator().manual_seed(x_rows))
            assert_twice_naive(planes_linear(x, planes.arguments), x, weight)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "rotation"), [(96, 16), (576, 64), (1024, 1024), (20, 4)])
def test_rotated_planes(kernel, name, dtype, columns, rotation):
    kernel(name, "float")
    planes = random_planes("2:4", 33, columns, scale_block=96, rotation=rotation)
    packed = RuntimePlanes.of(pack_planes(planes))
    for x_rows in (1, 3, 40):  # the last by decoded tiles
        x = torch.randn(x_rows, columns, generator=torch.Generator().manual_seed(x_rows)).to(dtype)
        exact = exact_product(x, planes.dense())
        size = torch.outer(x.double().norm(dim=1), planes.dense().double().norm(dim=1))
        bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert ((planes_linear(x, packed.arguments) - exact).abs() <= bound * size).all()


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "columns", [8, 120, 128, 136]
)  # a group, a block less a group, a block, and one more
def test_edge_sizes_agree_with_the_reference(kernel, name, dtype, rows, columns):
    planes = random_planes("4:8", rows, columns, scale_block=128)
    bias = torch.randn(rows).to(dtype)
    x = torch.randn(2, 1, columns).to(dtype)
    kernel("reference")
    expected = PackedLinear.of(planes, bias)(x) if columns > 8 else None  # such rows would not be packed
    kernel(name, "float")
    y = planes_linear(x, RuntimePlanes.of(pack_planes(planes)).arguments, bias)
    exact = exact_product(x, planes.dense(), bias)
    assert y.dtype == dtype
    assert y.shape == (2, 1, rows)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    if expected is not None:
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(("activations", "step"), [("float", 2**-32), (None, 2**-16), ("int8", 1 / 254)])
def test_error_stays_below_its_bound(kernel, name, activations, step):
    kernel(name, activations)
    planes, weight = runtime("4:8+2:8", 64, 576, scale_block=128)
    x = torch.randn(3, 576) * torch.logspace(-3, 3, 576)
    y = planes_linear(x, planes.arguments)
    packed = planes.packed().unpack()
    bound = torch.zeros(3, 64, dtype=torch.float64)
    for signs, scales in zip(packed.signs, packed.scales, strict=True):
        for block, columns in enumerate(torch.arange(576).split(128)):
            kept = (signs[:, columns] != 0).sum(1)
            bound += step * x[:, columns].abs().amax(1)[:, None] * (kept * scales[:, block])[None]
    exact = exact_product(x, weight)
    rounding = 64 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    assert ((y - exact).abs() <= bound + rounding / 16).all()
    if activations == "int8":
        assert (y - exact).abs().max() > rounding.max() / 64  # it did take 8 bits


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("x_rows", [1, 7, 24])
def test_results_are_the_same_bits_in_every_run_and_for_any_number_of_threads(kernel, name, x_rows):
    kernel(name)
    planes, _ = runtime("4:8", 1024, 512, scale_block=128)
    x = torch.randn(x_rows, 512)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(planes_linear(x, planes.arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("tile_weights", [1, 100 * 48, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_are_as_exact_as_a_dense_product(monkeypatch, tile_weights, dtype):
    monkeypatch.setattr(product, "_TILE_WEIGHTS", tile_weights)
    planes, weight = runtime("4:8+2:8", 250, 48)
    x, bias = torch.randn(5, 9, 48).to(dtype), torch.randn(250).to(dtype)
    y = planes_linear(x, planes.arguments, bias)
    assert y.shape == (5, 9, 250)
    assert_twice_naive(y, x, weight, bias)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(kernel, name, value):
    kernel(name)
    planes, _ = runtime("4:8", 5, 96)
    x = torch.randn(2, 96)
    x[1, 50] = value
    y = planes_linear(x, planes.arguments)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()  # as zeros of W times infinity


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size_work(kernel, scale):
    kernel(None, "float")
    planes, weight = runtime("4:8", 40, 96)
    x = scale * torch.randn(1, 96)
    y = planes_linear(x, planes.arguments)
    torch.testing.assert_close(y.double(), exact_product(x, weight), rtol=1e-5, atol=max(1e-6 * scale, 1e-28))


def test_rows_of_another_length_are_refused():
    planes, _ = runtime("4:8", 5, 96)
    with pytest.raises(RuntimeError, match="rows of 48 numbers; the packed linear takes 96"):
        planes_linear(torch.randn(1, 48), planes.arguments)


def test_no_rows_at_all_give_none():
    planes, _ = runtime("4:8", 5, 96)
    assert planes_linear(torch.randn(0, 96), planes.arguments).shape == (0, 5)


@pytest.mark.parametrize("x_rows", [2, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_x_and_bias_and_keep_no_decoded_matrix(x_rows, dtype):
    planes, weight = runtime("4:8", 40, 96)
    x = torch.randn(x_rows, 1, 96).to(dtype).requires_grad_()
    bias = torch.zeros(40, dtype=dtype, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda kept: kept
    ):
        y = planes_linear(x, planes.arguments, bias)
    grad = torch.randn(x_rows, 1, 40).to(dtype)
    y.backward(grad)
    tolerance = 4 * torch.finfo(dtype).eps
    expected = (grad.double() @ weight.double()).to(dtype)
    torch.testing.assert_close(x.grad, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)), rtol=tolerance, atol=4 * tolerance)
    assert not any(tensor.is_floating_point() for tensor in saved)


def test_operators_describe_themselves_to_torch():
    planes, _ = runtime("4:8", 5, 96)
    x = torch.randn(2, 96)
    torch.library.opcheck(torch.ops.pbsp.planes_linear.default, (x, *planes.arguments, torch.randn(5)))
    torch.library.opcheck(torch.ops.pbsp.planes_transposed.default, (torch.randn(2, 5), *planes.arguments))


def test_fake_tensors_pass_through_a_packed_linear():
    linear = PackedLinear.of(random_planes("4:8", 5, 96))
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = linear(torch.empty(2, 3, 96, dtype=torch.bfloat16))
    assert y.shape == (2, 3, 5)
    assert y.dtype == torch.bfloat16


COMPILED = """
import torch
from pbsp.packed_linear import PackedLinear
from random_planes import random_planes

linear = PackedLinear.of(random_planes("4:8", 64, 96), torch.randn(64))
model = torch.nn.Sequential(linear, torch.nn.ReLU(), PackedLinear.of(random_planes("2:8", 5, 64)))
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
x = torch.randn(2, 96)
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
x.requires_grad_()
compiled(x).sum().backward()
grad, x.grad = x.grad, None
model(x).sum().backward()
assert torch.equal(x.grad, grad)
"""


def test_a_compiled_model_computes_the_same(fresh):
    # In a process of its own: torch.compile cannot trace the type checks that tests run under.
    done = fresh(COMPILED)
    assert done.returncode == 0, done.stderr[-2000:]
