import pytest
import torch

from oracles import salient_count_by_trying
from pbsp.binarization.partition import magnitude_groups, salient_columns


def problem(rows=6, columns=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, [2, 9]] *= 6
    keep = torch.rand(rows, columns, generator=generator) < 0.7
    return weight, keep


def test_salient_count_has_the_least_error_of_all_counts():
    weight, keep = problem()
    saliency = weight.square()
    order = (saliency * keep).sum(0).argsort(descending=True)
    losses = salient_count_by_trying(weight, keep, order, 8)
    best = min(range(9), key=losses.__getitem__)
    salient = salient_columns(weight, keep, saliency)
    assert salient.nonzero()[:, 0].tolist() == sorted(order[:best].tolist())
    assert {2, 9} <= set(salient.nonzero()[:, 0].tolist())


def test_at_most_half_the_columns_and_at_most_fifty_are_salient():
    generator = torch.Generator().manual_seed(1)
    for columns in (4, 16, 128, 256):
        weight = torch.randn(3, columns, generator=generator) ** 3
        salient = salient_columns(weight, torch.ones_like(weight, dtype=torch.bool), weight.square())
        assert int(salient.sum()) <= min(50, columns // 2)


def test_magnitude_groups_are_split_at_p_and_twice_p():
    weight, keep = problem(rows=40, columns=64)
    groups = magnitude_groups(weight, keep, groups=3)
    size = weight.abs()
    edges = [size[groups == group] for group in range(3)]
    assert edges[0].max() <= edges[1].min()
    assert edges[1].max() <= edges[2].min()
    split = float(edges[1].min())
    largest = float((size * keep).max())
    assert float(edges[2].min()) >= 2 * split - 2 * largest / 64


def test_three_clusters_of_magnitudes_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 3, (20, 32), generator=generator)
    weight = torch.tensor([0.1, 0.4, 1.0])[group] * (
        torch.randint(0, 2, (20, 32), generator=generator) * 2 - 1
    )
    assert torch.equal(magnitude_groups(weight, torch.ones(20, 32, dtype=torch.bool), groups=3).long(), group)


def test_a_block_of_zeros_has_one_group():
    zeros = torch.zeros(2, 8)
    keep = torch.ones(2, 8, dtype=torch.bool)
    assert (magnitude_groups(zeros, keep, groups=3) == 0).all()
    assert not salient_columns(zeros, keep, zeros).any()


def test_two_groups_are_split_where_binarizing_each_leaves_the_least_error():
    weight, keep = problem(rows=20, columns=32)
    size, largest = weight.abs(), float((weight.abs() * keep).max())

    def error(groups):
        total = 0.0
        for row in range(len(weight)):
            for group in (0, 1):
                values = size[row][keep[row] & (groups[row] == group)]
                total += float((values - values.mean()).square().sum()) if len(values) else 0.0
        return total

    candidates = [(size / largest * 64).floor().clamp_max(63) >= split for split in range(1, 64)]
    best = min(error(candidate.to(torch.uint8)) for candidate in candidates)
    assert abs(error(magnitude_groups(weight, keep, groups=2)) - best) < 1e-3 * best


def test_three_groups_are_split_where_binarizing_each_leaves_the_least_error():
    weight, keep = problem(rows=20, columns=32, seed=3)
    bins = (weight.abs() / float((weight.abs() * keep).max()) * 64).floor().clamp_max(63)

    def error(groups):
        members = [(row, keep[i] & (groups[i] == g)) for i, row in enumerate(weight.abs()) for g in range(3)]
        return sum(float((row[m] - row[m].mean()).square().sum()) for row, m in members if m.any())

    errors = [error((bins >= split).long() + (bins >= 2 * split)) for split in range(1, 33)]
    assert error(magnitude_groups(weight, keep, groups=3)) == pytest.approx(min(errors), rel=1e-5)


def test_one_group_has_no_split_and_pruned_weights_do_not_count():
    weight, keep = problem()
    assert (magnitude_groups(weight, keep, groups=1) == 0).all()
    for groups in (2, 3):
        spoiled = torch.where(keep, weight, 100 * weight)
        found = magnitude_groups(spoiled, keep, groups=groups)
        assert torch.equal(found[keep], magnitude_groups(weight, keep, groups=groups)[keep])
        assert found.max() == groups - 1


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_equal_magnitudes_are_one_group(groups):
    signs = torch.tensor([[1.0, -1.0] * 4])
    assert len(magnitude_groups(signs, signs > -2, groups=groups).unique()) == 1
