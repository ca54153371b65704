import pytest
import torch

from oracles import best_code_by_enumeration, points_of_e8
from pbsp.binarization.codebook import best_codes, codebook, enumerated_codes, nearest_points, nearest_vectors
from pbsp.compiled import KERNELS, REFERENCE, library
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern
from variants import code_problem as problem


def loss(code, correlation, metric, scale):
    return scale * ((metric @ code) * code).sum(0) - 2 * (code * correlation).sum(0)


@pytest.mark.parametrize("text", ["1:1", "1:4", "2:4", "2:8", "4:8", "5:8", "8:8", "2:16"])
@pytest.mark.parametrize("search", [best_codes, enumerated_codes])
def test_best_code_equals_enumeration(text, search):
    pattern = Pattern.parse(text)
    correlation, metric, scale = problem(5, pattern.group)
    found = search(correlation, metric, scale, pattern)
    for row in range(5):
        expected = best_code_by_enumeration(correlation[:, row], metric, scale[row], pattern)
        assert torch.equal(found[:, row], expected)


def test_codebook_holds_every_code_once():
    codes = codebook(Pattern(4, 8), torch.device("cpu")).reshape(-1, 8)
    assert len(torch.unique(codes, dim=0)) == len(codes) == 70 * 16
    assert ((codes != 0).sum(1) == 4).all()


@pytest.mark.parametrize("text", ["4:16", "8:16", "6:12"])
@pytest.mark.parametrize("name", [None, "reference"])
def test_large_codebooks_give_a_code_that_no_single_move_improves(text, name, kernel):
    kernel(name)
    pattern = Pattern.parse(text)
    correlation, metric, scale = problem(4, pattern.group, seed=3)
    found = best_codes(correlation, metric, scale, pattern)
    assert ((found != 0).sum(0) == pattern.kept).all()
    for row in range(4):
        best = float(loss(found, correlation, metric, scale)[row])
        code, kept = found[:, row], found[:, row].nonzero()[:, 0].tolist()
        for away in kept:
            for arrive in [away, *(set(range(pattern.group)) - set(kept))]:
                for sign in (1.0, -1.0):
                    moved = code.clone()
                    moved[away], moved[arrive] = 0.0, sign
                    moved = moved.where(torch.arange(pattern.group) != away, sign if arrive == away else 0.0)
                    other = loss(moved[:, None], correlation[:, row : row + 1], metric, scale[row : row + 1])
                    assert float(other) >= best - 1e-5


def test_ties_take_the_lowest_index_first():
    pattern = Pattern(2, 4)
    found = best_codes(torch.ones(4, 1), torch.eye(4), torch.ones(1), pattern)
    assert found[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_zero_scale_takes_the_code_that_correlates_best():
    found = best_codes(
        torch.tensor([[0.1], [-3.0], [2.0], [0.0]]), torch.eye(4), torch.zeros(1), Pattern(2, 4)
    )
    assert found[:, 0].tolist() == [0.0, -1.0, 1.0, 0.0]


@pytest.fixture(params=[*KERNELS, REFERENCE])
def every_kernel(request, kernel):
    if request.param != REFERENCE and not library().pbsp_supports(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    kernel(request.param)


def spread_values(count, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, 8, generator=generator)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("count", [1, 16, 37])
def test_nearest_points_of_e8_equal_enumeration(count):
    values = spread_values(count, 0.7, count).clamp(-2, 2)
    found = nearest_points(values)
    points = torch.tensor(list(points_of_e8()), dtype=torch.float64)
    assert torch.equal(found.double(), points[torch.cdist(values.double(), points).argmin(1)])


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("bits", [8, 9, 10, 12])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5, 4.0, 1e6, 1e12])
def test_nearest_vectors_have_codes_and_none_is_nearer(bits, spread):
    values = spread_values(40, spread, bits)
    found = nearest_vectors(values.view(4, 80), Lattice(bits)).view(40, 8).double()
    codes = Lattice(bits).codes().double()
    distances = (values.double()[:, None] - codes).square().sum(2)
    chosen = (found[:, None] == codes).all(2)
    assert (chosen.sum(1) == 1).all()
    # Far away all codes are as near in float32.
    torch.testing.assert_close(distances[chosen], distances.amin(1), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("every_kernel")
def test_points_far_away_are_whole():
    found = nearest_points(spread_values(5, 1e9, 0).clamp(-9e5, 9e5))
    assert torch.equal(found % 2, found[:, :1].expand(5, 8) % 2)
    assert (found.double().sum(1) % 4 == 0).all()
