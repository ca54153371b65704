import torch

from pbsp.models.products import products_dtype, quick_products

CPU = torch.device("cpu")


def test_only_float32_on_a_cpu_that_has_the_instructions_is_rounded(matrix_instructions):
    assert products_dtype(torch.float32, CPU) == torch.float32
    matrix_instructions(True)
    assert products_dtype(torch.float32, CPU) == torch.bfloat16
    assert products_dtype(torch.float32, torch.device("cuda")) == torch.float32
    assert products_dtype(torch.float16, CPU) == torch.float16
    assert products_dtype(torch.float64, CPU) == torch.float64


def test_products_are_those_of_rounded_inputs(matrix_instructions):
    matrix_instructions(True)
    x, weight = torch.randn(3, 40), torch.randn(5, 40)
    with quick_products(torch.float32, CPU):
        found = torch.nn.functional.linear(x, weight)
        assert torch.nn.functional.layer_norm(x, (40,)).dtype == torch.float32
    assert found.dtype == torch.bfloat16
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-5)
    assert torch.nn.functional.linear(x, weight).dtype == torch.float32


def test_gradients_stay_in_float32(matrix_instructions):
    matrix_instructions(True)
    x, weight = torch.randn(3, 40), torch.randn(5, 40, requires_grad=True)
    with quick_products(torch.float32, CPU):
        loss = torch.nn.functional.linear(x, weight).float().square().sum()
    loss.backward()
    wanted = 2 * (x @ weight.detach().T).T @ x
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - wanted).norm() < 0.01 * wanted.norm()
