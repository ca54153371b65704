import pytest
import torch

from oracles import best_code_by_enumeration
from pbsp.binarization import codebook
from pbsp.binarization.codebook import best_codes, enumerated_codes, enumerated_vectors
from pbsp.binarization.search import search_codes, search_vectors, searches
from pbsp.compiled import KERNELS, library, loaded
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern
from variants import code_problem as problem

pytestmark = pytest.mark.skipif(not loaded(), reason="no compiled kernels")
SUPPORTED = [name for name in KERNELS if loaded() and library().pbsp_supports(name.encode())]


def losses(codes, correlation, metric, scale):
    codes, correlation, metric, scale = (tensor.double() for tensor in (codes, correlation, metric, scale))
    return scale * ((metric @ codes) * codes).sum(0) - 2 * (codes * correlation).sum(0)


@pytest.mark.parametrize("text", ["1:1", "1:4", "2:4", "1:8", "3:8", "7:8", "8:8", "2:16", "2:40"])
def test_every_path_finds_the_best_code(text, kernel):
    pattern = Pattern.parse(text)
    given = problem(9, pattern.group)
    correlation, metric, scale = given
    expected = [
        best_code_by_enumeration(correlation[:, row], metric, scale[row], pattern) for row in range(9)
    ]
    for name in SUPPORTED:
        kernel(name)
        assert torch.equal(search_codes(*given, pattern), torch.stack(expected, 1)), name


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 700])
def test_paths_and_threads_give_the_same_codes(rows, kernel):
    pattern = Pattern(4, 8)
    given = problem(rows, 8, seed=rows)
    results = []
    threads = torch.get_num_threads()
    for name in SUPPORTED:
        kernel(name)
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(search_codes(*given, pattern))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert ((results[0] != 0).sum(0) == 4).all()
    torch.testing.assert_close(losses(results[0], *given), losses(enumerated_codes(*given, pattern), *given))


@pytest.mark.parametrize("bits", [8, 9, 12])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 300])
def test_every_path_finds_the_best_vector(bits, rows, kernel):
    given = problem(rows, 8, seed=rows)
    codes = Lattice(bits).codes()
    half = codes[: len(codes) // 2]
    tried = codes.T[:, :, None].expand(-1, -1, rows).reshape(8, -1)
    every = losses(tried, *repeated(given, len(codes)))
    threads = torch.get_num_threads()
    for name in SUPPORTED:
        kernel(name)
        for count in (1, 3):
            torch.set_num_threads(count)
            found = search_vectors(*given, half)
            assert torch.equal(found, enumerated_vectors(*given, half.float())), name
            torch.testing.assert_close(losses(found, *given), every.view(len(codes), rows).amin(0))
    torch.set_num_threads(threads)


def repeated(given, times):
    """The same problems so many times, one copy after the other."""
    correlation, metric, scale = given
    return correlation.repeat(1, times), metric, scale.repeat(times)


def test_views_are_read_as_they_are():
    correlation, metric, scale = problem(40, 8)
    wide = torch.stack([correlation, -correlation], 2)[..., 0]
    assert not wide.is_contiguous()
    pattern = Pattern(3, 8)
    assert torch.equal(
        search_codes(wide, metric.T, scale, pattern), search_codes(correlation, metric, scale, pattern)
    )


def test_a_zero_scale_takes_the_code_that_correlates_best():
    correlation = torch.tensor([[0.1], [-3.0], [2.0], [0.0]])
    found = search_codes(correlation, torch.eye(4), torch.zeros(1), Pattern(2, 4))
    assert found[:, 0].tolist() == [0.0, -1.0, 1.0, 0.0]


def test_ties_take_the_first_support_and_plus():
    for correlation in (torch.ones(4, 1), torch.zeros(4, 1)):
        found = search_codes(correlation, torch.eye(4), torch.ones(1), Pattern(2, 4))
        assert found[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_numbers_that_are_not_finite_still_give_a_code():
    correlation, metric, scale = problem(20, 8)
    correlation[2, 3], scale[5] = torch.nan, torch.inf
    found = search_codes(correlation, metric, scale, Pattern(4, 8))
    assert ((found != 0).sum(0) == 4).all()
    assert (found.abs() <= 1).all()


def test_other_numbers_and_wide_groups_take_torchs_way(kernel, monkeypatch):
    correlation, _, _ = problem(3, 8)
    kernel(SUPPORTED[0])
    assert searches(correlation, Pattern(4, 8))
    assert not searches(correlation.double(), Pattern(4, 8))
    assert not searches(correlation, Pattern(1, 65))
    kernel("reference")
    assert not searches(correlation, Pattern(4, 8))
    monkeypatch.setattr(codebook, "search_codes", None)  # must not be called
    assert best_codes(*problem(3, 8), Pattern(4, 8)).shape == (8, 3)
