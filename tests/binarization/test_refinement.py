import pytest
import torch

from oracles import scales_by_least_squares
from pbsp.binarization.codebook import codebook
from pbsp.binarization.planes import expand_scales
from pbsp.binarization.refinement import descend_codes, refit_scales
from pbsp.pruning.pattern import parse_patterns


def random_signs(patterns, rows, columns, generator):
    planes = []
    for pattern in patterns:
        codes = codebook(pattern, torch.device("cpu")).reshape(-1, pattern.group)
        pick = torch.randint(len(codes), (rows, columns // pattern.group), generator=generator)
        planes.append(codes[pick].reshape(rows, columns))
    return torch.stack(planes).double()


def problem(patterns, rows=6, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return inputs, weight, random_signs(patterns, rows, columns, generator)


def loss(weight, signs, scales, hessian, block):
    residual = weight - (signs * expand_scales(scales, block, weight.shape[1])).sum(0)
    return float(((residual @ hessian) * residual).sum())


@pytest.mark.parametrize("text", ["2:4", "4:8+2:8", "2:4+1:8+1:4"])
@pytest.mark.parametrize("block", [8, 16, 24])
def test_joint_refit_equals_least_squares_on_the_tokens(text, block):
    inputs, weight, signs = problem(parse_patterns(text))
    found = refit_scales(weight, signs, inputs.T @ inputs, block)
    expected = scales_by_least_squares(weight, signs, inputs, block)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # the ridge is 1e-6


def test_equal_planes_are_still_solvable():
    inputs, weight, signs = problem(parse_patterns("4:8"))
    found = refit_scales(weight, signs.repeat(2, 1, 1), inputs.T @ inputs, 24)
    alone = refit_scales(weight, signs, inputs.T @ inputs, 24)
    torch.testing.assert_close(found.sum(0), alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["4:8", "2:4+1:8", "2:8+4:16"])
def test_descent_never_raises_the_loss_and_keeps_the_pattern(text):
    patterns = parse_patterns(text)
    inputs, weight, signs = problem(patterns, rows=9, columns=48)
    hessian = inputs.T @ inputs
    scales = refit_scales(weight, signs, hessian, 16).abs()
    before = loss(weight, signs, scales, hessian, 16)
    for _ in range(3):
        signs = descend_codes(weight, signs, scales, hessian, patterns=patterns, scale_block=16)
        after = loss(weight, signs, scales, hessian, 16)
        assert after <= before * (1 + 1e-9)
        before = after
    for plane, pattern in zip(signs, patterns, strict=True):
        assert ((plane.reshape(9, -1, pattern.group) != 0).sum(2) == pattern.kept).all()


def test_descent_ends_where_no_single_group_can_improve():
    patterns = parse_patterns("2:4+1:4")
    inputs, weight, signs = problem(patterns, rows=2, columns=12)
    hessian = inputs.T @ inputs
    scales = refit_scales(weight, signs, hessian, 12).abs()
    for _ in range(20):
        signs = descend_codes(weight, signs, scales, hessian, patterns=patterns, scale_block=12)
    best = loss(weight, signs, scales, hessian, 12)
    for plane, pattern in enumerate(patterns):
        for code in codebook(pattern, torch.device("cpu")).reshape(-1, 4).double():
            for row in range(2):
                for group in range(3):
                    other = signs.clone()
                    other[plane, row, 4 * group : 4 * group + 4] = code
                    assert loss(weight, other, scales, hessian, 12) >= best - 1e-9
