import pytest
import torch

from oracles import best_code_by_enumeration
from pbsp.binarization.codebook import best_codes, codebook, enumerated_codes
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
