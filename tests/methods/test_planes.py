import pytest
import torch

from pbsp.binarization.rotation import unrotate
from pbsp.binarization.scales import round_scales
from pbsp.errors import CalibrationError, PatternError
from pbsp.methods.planes import PlaneFit
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern, parse_patterns
from pbsp.solver.hessian import output_error


def problem(rows=8, columns=64, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / tokens


def assert_valid(planes):
    for signs, pattern in zip(planes.signs, planes.patterns, strict=True):
        if isinstance(pattern, Lattice):
            codes = {tuple(code) for code in pattern.codes().tolist()}
            assert {tuple(group) for group in signs.reshape(-1, 8).tolist()} <= codes
            continue
        kept = (signs.reshape(len(signs), -1, pattern.group) != 0).sum(2)
        assert (kept == pattern.kept).all()
    assert torch.isfinite(planes.scales).all()
    assert torch.equal(round_scales(planes.scales), planes.scales)


@pytest.mark.parametrize(
    "text",
    [
        "4:8",
        "2:8",
        "8:8",
        "1:1",
        "4:8+2:8",
        "3:8+3:8+1:8",
        "2:4+2:16+1:4+1:8",
        "4:16",
        "e8-8",
        "e8-12+e8-9+1:4",
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_fit_gives_codes_and_storable_scales(text, rows):
    weight, moment = problem(rows=rows)
    planes = PlaneFit(parse_patterns(text), block=32).compress(weight, moment)
    assert_valid(planes)
    assert planes.scales.shape == (len(planes.patterns), rows, 2)


def test_fit_beats_magnitude_binarization_by_far():
    weight, moment = problem(rows=64)
    fit = PlaneFit(parse_patterns("4:8"), block=32).compress(weight, moment)
    grouped = weight.view(64, -1, 8)
    kept = torch.zeros_like(grouped).scatter_(2, grouped.abs().topk(4, 2).indices, 1.0).view_as(weight)
    scale = (weight.abs() * kept).view(64, 2, 32).sum(2, keepdim=True) / 16
    naive = (scale * (weight.sign() * kept).view(64, 2, 32)).view_as(weight)
    assert output_error(weight, fit.dense(), moment) < 0.6 * output_error(weight, naive, moment)


@pytest.mark.parametrize("text", ["4:8", "e8-10"])
def test_more_sweeps_lower_the_error(text):
    weight, moment = problem(rows=32)
    errors = [
        output_error(
            weight,
            PlaneFit(parse_patterns(text), 32, sweeps=sweeps).compress(weight, moment).dense(),
            moment,
        )
        for sweeps in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_lattice_has_lower_errors_than_planes_of_as_many_bits():
    weight, moment = problem(rows=64)[0], torch.eye(64)
    for lattice, planes in (("e8-8", "8:8"), ("e8-9", "3:8"), ("e8-10", "7:8"), ("e8-8+e8-8", "8:8+8:8")):
        texts = (lattice, planes)
        fits = [PlaneFit(parse_patterns(text), block=32).compress(weight, moment) for text in texts]
        bits = [sum(pattern.code_bits for pattern in fit.patterns) for fit in fits]
        assert bits[0] == bits[1]
        errors = [output_error(weight, fit.dense(), moment) for fit in fits]
        assert errors[0] < errors[1]


def test_vectors_of_a_lattice_are_found_exactly():
    generator = torch.Generator().manual_seed(4)
    codes = Lattice(8).codes()[torch.randint(0, 256, (6, 8), generator=generator)].view(6, 64)
    planes = PlaneFit(parse_patterns("e8-8"), block=64, rotation=1).compress(0.75 * codes, torch.eye(64))
    assert torch.equal(planes.dense(), 0.75 * codes)


def test_weights_that_are_planes_already_are_found_exactly():
    generator = torch.Generator().manual_seed(4)
    support = torch.rand(6, 8, 8, generator=generator).topk(4, 2).indices
    signs = torch.randint(0, 2, (6, 8, 4), generator=generator) * 2.0 - 1
    weight = 0.75 * torch.zeros(6, 8, 8).scatter_(2, support, signs).view(6, 64)
    planes = PlaneFit(parse_patterns("4:8"), block=64, rotation=1).compress(weight, torch.eye(64))
    assert torch.equal(planes.dense(), weight)
    turned = PlaneFit(parse_patterns("4:8"), block=64).compress(unrotate(weight, 64), torch.eye(64))
    assert turned.rotation == 64
    torch.testing.assert_close(turned.rotated(), weight)
    torch.testing.assert_close(turned.dense(), unrotate(weight, 64))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 16),
        torch.full((3, 16), 0.5),
        torch.tensor([[1e4] + [1e-3] * 15] * 3),
        torch.tensor([[1.0, -1.0] * 8, [0.0] * 15 + [2.0], [1e-20] * 16]),
    ],
    ids=["zero", "constant", "outlier", "mixed"],
)
@pytest.mark.parametrize("text", ["2:4", "2:4+1:4"])
def test_degenerate_rows_give_valid_finite_planes(weight, text):
    planes = PlaneFit(parse_patterns(text), block=16).compress(weight, torch.eye(16))
    assert_valid(planes)
    assert torch.isfinite(planes.dense()).all()
    assert output_error(weight, planes.dense(), torch.eye(16)) <= 1.0


def test_all_zero_rows_stay_zero():
    weight, moment = problem()
    weight[2] = 0
    assert (PlaneFit(parse_patterns("4:8")).compress(weight, moment).dense()[2] == 0).all()


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_moment_of_few_tokens_is_solved(tokens):
    weight, moment = problem(tokens=tokens)
    planes = PlaneFit(parse_patterns("4:8")).compress(weight, moment)
    assert_valid(planes)
    assert output_error(weight, planes.dense(), moment) < 0.2


def test_rows_that_do_not_tile_and_bad_moments_are_refused():
    weight, moment = problem()
    with pytest.raises(PatternError, match="left over"):
        PlaneFit((Pattern(4, 7),), block=7).compress(weight, moment)
    moment[0, 0] = float("nan")
    with pytest.raises(CalibrationError):
        PlaneFit((Pattern(4, 8),)).compress(weight, moment)


def test_rows_are_independent():
    weight, moment = problem(rows=5)
    together = PlaneFit(parse_patterns("4:8+2:8")).compress(weight, moment)
    alone = PlaneFit(parse_patterns("4:8+2:8")).compress(weight[3:4], moment)
    assert output_error(together.dense()[3:4], alone.dense(), moment) < 0.05
