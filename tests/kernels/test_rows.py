import pytest
import torch

from pbsp.compiled import KERNELS, library, loaded
from pbsp.kernels.rows import rows_linear
from pbsp.quantization.rows import dequantize_rows, quantize_rows


def problem(rows, columns, count, seed=0, *, bits=8):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return quantize_rows(weight, bits), torch.randn(count, columns, generator=generator)


def errors(found, x, packed, bits=8):
    """Largest error of the product, and of the plain float32 one, against float64."""
    exact = x.double() @ dequantize_rows(packed, bits).double().T
    plain = x @ dequantize_rows(packed, bits).T
    return float((found.double() - exact).abs().max()), float((plain.double() - exact).abs().max())


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize(
    ("columns", "bits"), [*((n, 8) for n in (1, 7, 63, 64, 65, 576)), *((n, 4) for n in (32, 96, 576))]
)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 16, 17])
def test_products_equal_the_dense_ones_to_rounding(rows, columns, bits, count):
    packed, x = problem(rows, columns, count, bits=bits)
    found, plain = errors(rows_linear(x, packed, bits), x, packed, bits)
    assert found <= 2 * plain + 1e-6 * columns**0.5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_rounded_once(dtype, bits):
    packed, x = problem(40, 96, 3, bits=bits)
    x = x.to(dtype)
    expected = rows_linear(x.float(), packed, bits).to(dtype)
    assert torch.equal(rows_linear(x, packed, bits), expected)


@pytest.mark.skipif(not loaded(), reason="no compiled kernels")
@pytest.mark.parametrize(("columns", "bits"), [(200, 8), (224, 4)])
@pytest.mark.parametrize("name", KERNELS)
def test_every_path_agrees_and_threads_change_nothing(name, columns, bits):
    if not library().pbsp_supports(name.encode()):
        pytest.skip("not on this machine")
    packed, x = problem(3000, columns, 5, bits=bits)
    results = []
    for threads in (1, 2, 3):
        result = torch.empty(5, 3000)
        arguments = (packed.data_ptr(), 3000, columns, x.data_ptr(), 5, result.data_ptr(), threads)
        assert library().pbsp_multiply_rows(name.encode(), bits, *arguments) == 0
        results.append(result)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    found, plain = errors(results[0], x, packed, bits)
    assert found <= 2 * plain + 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_reach_x(bits):
    packed, x = problem(20, 64, 2, bits=bits)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(rows_linear(x, packed, bits).sum(), x)
    expected = dequantize_rows(packed, bits).sum(0).expand(2, -1)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


PROBLEM = (
    "import torch\n"
    "from pbsp.kernels.rows import rows_linear, _by_tiles\n"
    "from pbsp.quantization.rows import quantize_rows\n"
    "torch.manual_seed(0)\n"
    "packed, x = quantize_rows(torch.randn(30, 70)), torch.randn(2, 70)\n"
)


def test_compiled_graphs_see_one_step(fresh):
    # In a process of its own, without the checks of annotations, which torch.compile cannot follow.
    ended = fresh(
        PROBLEM
        + "compiled = torch.compile(lambda x: rows_linear(x, packed), fullgraph=True, backend='aot_eager')\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(compiled(x), rows_linear(x, packed))\n"
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_the_reference_path_is_taken_when_asked_for(fresh):
    script = PROBLEM + "assert torch.equal(rows_linear(x, packed), _by_tiles(x, packed, 8))"
    ended = fresh(script, PBSP_KERNEL="reference")
    assert ended.returncode == 0, ended.stderr[-2000:]
