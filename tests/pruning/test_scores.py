import pytest
import torch

from oracles import best_mask_by_enumeration
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.scores import SCORES, ScoreInputs, removal_cost
from pbsp.solver.hessian import damped, inverse_factor


def problem(rows=4, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(100, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return torch.randn(rows, columns, generator=generator), damped(inputs.T @ inputs / 100, 0.01).float()


def inputs_of(weight, hessian):
    return ScoreInputs(weight, hessian.diagonal(), inverse_factor(hessian).float().diagonal())


def test_keep_largest_keeps_n_of_every_m_and_breaks_ties_low():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0]])
    assert keep_largest(scores, 2, 4).tolist() == [[True, False, True, False, True, True, False, False]]


@pytest.mark.parametrize(
    ("kept", "group"), [(1, 1), (1, 4), (4, 8), (7, 8), (5, 16), (16, 16), (5, 17), (8, 64)]
)
def test_keep_largest_equals_sorting_every_group(kept, group):
    generator = torch.Generator().manual_seed(group)
    scores = torch.randint(-3, 4, (5, 6 * group), generator=generator).double()  # many ties
    scores[scores == -3] = -torch.inf
    for row, keep in zip(scores.tolist(), keep_largest(scores, kept, group).tolist(), strict=True):
        for low in range(0, len(row), group):
            order = sorted(range(low, low + group), key=lambda place: (-row[place], place))
            assert [place for place in range(low, low + group) if keep[place]] == sorted(order[:kept])


def test_keep_largest_stays_among_what_is_still_kept():
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    among = torch.tensor([[False, True, True, True]])
    assert keep_largest(scores, 2, 4, among=among).tolist() == [[False, False, True, True]]


def test_scores_equal_their_formulas():
    weight = torch.tensor([[3.0, -4.0], [0.5, 1.0]])
    inputs = ScoreInputs(weight, torch.tensor([4.0, 16.0]), torch.tensor([2.0, 0.5]))
    assert torch.equal(SCORES["magnitude"](inputs), torch.tensor([[3.0, 4.0], [0.5, 1.0]]))
    assert torch.equal(SCORES["wanda"](inputs), torch.tensor([[6.0, 16.0], [1.0, 4.0]]))
    torch.testing.assert_close(SCORES["hessian"](inputs), torch.tensor([[9 / 4, 64.0], [0.0625, 4.0]]))
    si = (3 / 3.5 + 3 / 7) * 2**0.5
    torch.testing.assert_close(SCORES["si"](inputs)[0, 0], torch.tensor(si))


def test_random_score_depends_on_its_seed_alone():
    weight, hessian = problem()
    base = inputs_of(weight, hessian)
    other = ScoreInputs(base.weight, base.energy, base.factor_diagonal, seed=1)
    assert torch.equal(SCORES["random"](base), SCORES["random"](base))
    assert not torch.equal(SCORES["random"](base), SCORES["random"](other))


def test_removal_cost_is_the_exact_rise_of_the_loss():
    weight, hessian = problem()
    approximation = weight + 0.3 * torch.randn_like(weight)
    costs = removal_cost(weight, approximation, hessian)

    def loss(q):
        return (((weight - q) @ hessian) * (weight - q)).sum(1)

    for column in range(8):
        removed = approximation.clone()
        removed[:, column] = 0
        torch.testing.assert_close(
            costs[:, column], loss(removed) - loss(approximation), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kept", [4, 6])
def test_hessian_score_comes_near_the_exhaustive_mask_and_random_does_not(kept):
    losses = {"best": 0.0, "hessian": 0.0, "magnitude": 0.0, "random": 0.0}
    for seed in range(20):
        weight, hessian = problem(rows=1, seed=seed)
        losses["best"] += best_mask_by_enumeration(weight[0], hessian, kept)[1]
        for name in ("hessian", "magnitude", "random"):
            keep = keep_largest(SCORES[name](inputs_of(weight, hessian)), kept, 8)[0]
            index = keep.nonzero()[:, 0]
            inner = hessian[index][:, index]
            residual = weight[0].clone()
            residual[index] -= torch.linalg.solve(inner, hessian[index] @ weight[0])
            losses[name] += float(residual @ hessian @ residual)
    assert losses["best"] <= losses["hessian"] < losses["magnitude"] < losses["random"]
