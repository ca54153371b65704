from itertools import pairwise

import pytest
import torch

from oracles import arb_by_loop, binarized_by_level, rank_one_terms_by_loop
from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.binarization.partition import magnitude_groups, salient_columns
from pbsp.methods.arb import Arb, rank_one_scales
from pbsp.methods.billm import Billm
from pbsp.solver.hessian import output_error
from variants import layer_problem


def one_group(weight, *, means=True):
    columns = torch.zeros(weight.shape[1], dtype=torch.bool)
    groups = torch.zeros(weight.shape, dtype=torch.uint8)
    return BlockFit.start(weight, torch.ones_like(groups).bool(), columns, groups, Scheme(1, 0, means=means))


def partitioned(weight, scheme):
    """BiLLM's groups, salient columns split, too, if the scheme says so; all kept."""
    keep = torch.ones_like(weight, dtype=torch.bool)
    salient = salient_columns(weight, keep, weight.square())
    outside = magnitude_groups(weight, keep & ~salient, groups=scheme.groups)
    inside = magnitude_groups(weight, keep & salient, groups=scheme.salient_groups)
    return BlockFit.start(weight, keep, salient, torch.where(salient, inside, outside), scheme)


def squared_error(fit, weight):
    return float((weight - fit.dense()).square().sum())


@pytest.mark.parametrize("columns", [1, 2, 31, 128])
def test_a_round_equals_the_loop_of_the_paper(columns):
    weight, _ = layer_problem(5, columns, dtype=torch.float64)
    weight[1] = weight[1].abs()
    weight[2] += 3
    fit = one_group(weight)
    expected = [arb_by_loop(row, 15) for row in weight.tolist()]
    for number in range(16):
        for row, states in enumerate(expected):
            mean, alpha, signs = states[number]
            assert fit.coefficients[row].tolist() == pytest.approx([alpha, mean], abs=1e-12)
            assert fit.signs[row].tolist() == signs
        fit = fit.refit(weight, torch.eye(columns).double(), alternations=1, ridge=0.0).refresh(weight)


@pytest.mark.parametrize("salient_groups", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_no_round_raises_the_squared_error(salient_groups, seed):
    weight, _ = layer_problem(8, 48, dtype=torch.float64, seed=seed)
    weight[:, [3, 17]] *= 4
    fit = partitioned(weight, Scheme(2, salient_groups))
    identity = torch.eye(48).double()
    errors = [squared_error(fit, weight)]
    for _ in range(15):
        fitted = fit.refit(weight, identity, alternations=1, ridge=0.0)
        fit = fitted.refresh(weight)
        errors += [squared_error(fitted, weight), squared_error(fit, weight)]
    assert all(after <= before + 1e-10 for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_more_rounds_lower_the_error_of_the_method():
    weight, moment = layer_problem(16, 64)
    errors = [
        float(
            (
                weight
                - Arb("arb", rounds=rounds, compensation="none", block=32).compress(weight, moment).dense()
            )
            .square()
            .sum()
        )
        for rounds in (1, 2, 5, 15)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_arb_x_lowers_the_output_error_of_arb(bitmap, seed):
    weight, moment = layer_problem(16, 48, seed=seed)
    errors = {
        variant: output_error(weight, Arb(variant, bitmap).compress(weight, moment).dense(), moment)
        for variant in ("arb", "x")
    }
    assert errors["x"] < 0.95 * errors["arb"]


def test_arb_x_keeps_the_signs_and_groups_of_arb():
    weight, moment = layer_problem()
    arb, x = (Arb(variant).compress(weight, moment) for variant in ("arb", "x"))
    assert torch.equal(arb.signs, x.signs)
    assert torch.equal(arb.groups, x.groups)
    assert torch.equal(arb.residual_signs, x.residual_signs)
    assert not torch.equal(arb.scalars, x.scalars)


def test_magnitudes_of_rank_one_are_found_exactly():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(2, 12, generator=generator).double() + 0.1
    weight = torch.outer(rows, columns) * (2 * torch.randint(0, 2, (12, 12), generator=generator) - 1)
    fit = rank_one_scales(one_group(weight, means=False), weight, rounds=1)
    torch.testing.assert_close(fit.dense(), weight, rtol=1e-12, atol=0)
    assert torch.equal(fit.signs, torch.where(weight < 0, -1.0, 1.0).double())
    assert float(fit.column_scales[0].mean()) == pytest.approx(1)  # so that both fit in float16


@pytest.mark.parametrize("rounds", [1, 2, 15])
@pytest.mark.parametrize("seed", range(2))
def test_rank_one_scales_equal_a_slow_loop(rounds, seed):
    weight, _ = layer_problem(6, 20, dtype=torch.float64, seed=seed)
    weight[:, [3, 7, 11]] *= 4
    fit = partitioned(weight, Scheme(2, 2, means=False))
    found = rank_one_scales(fit, weight, rounds=rounds).dense()
    assert fit.salient.any()
    for level in fit.scheme.levels():
        member = fit.members(level)
        expected = rank_one_terms_by_loop(weight, member, 1 + level.salient, rounds)
        torch.testing.assert_close(found * member, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("salient_groups", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_no_round_of_rank_one_scales_raises_the_squared_error(salient_groups, seed):
    weight, _ = layer_problem(8, 48, dtype=torch.float64, seed=seed)
    fit = partitioned(weight, Scheme(2, salient_groups, means=False))
    errors = [squared_error(rank_one_scales(fit, weight, rounds=rounds), weight) for rounds in range(1, 16)]
    assert all(after <= before + 1e-10 for before, after in pairwise(errors))
    assert errors[0] < squared_error(fit, weight)


@pytest.mark.parametrize("bitmap", [False, True])
def test_rank_one_scales_are_stored_per_column_and_in_float16(bitmap):
    weight, moment = layer_problem(9, 80)
    result = Arb("rc", bitmap, block=32).compress(weight, moment)
    assert result.scheme == Scheme(2, 1 + bitmap, means=False)
    assert result.scalars.shape == (9, 3, 4 + 2 * bitmap)
    assert result.column_scales.shape == (1, 4 + 2 * bitmap, 80)
    for values in (result.scalars, result.column_scales):
        assert torch.equal(values.half().float(), values)
    assert 0.2 < float(result.column_scales.mean()) < 5


def test_parts_of_joined_rows_keep_their_own_columns():
    problems = [layer_problem(rows, 40, seed=rows) for rows in (8, 4, 4)]
    results = [Arb(block=16).compress(*problem) for problem in problems]
    joined = GroupedBinarization.join(results)
    assert len(joined.salient) == len(joined.column_scales) == 4  # the first is two parts of four rows
    assert torch.equal(joined.dense(), torch.cat([result.dense() for result in results]))
    whole = results[0]
    parts = whole.split([3, 4, 1])
    assert [len(part.signs) for part in parts] == [3, 4, 1]
    assert torch.equal(torch.cat([part.dense() for part in parts]), whole.dense())
    assert torch.equal(GroupedBinarization.join(parts).dense(), whole.dense())


def test_bitmaps_split_salient_columns_and_lower_the_error():
    weight, moment = layer_problem(24, 64)
    for variant in ("arb", "x", "rc"):
        split, whole = (Arb(variant, bitmap).compress(weight, moment) for bitmap in (True, False))
        assert split.groups[:, split.salient[0]].any()
        assert not whole.groups[:, whole.salient[0]].any()
        assert torch.equal(split.salient, whole.salient)
        assert output_error(weight, split.dense(), moment) < output_error(weight, whole.dense(), moment)


def test_groups_and_start_are_those_of_billm():
    weight, moment = layer_problem(8, 48)
    billm = Billm().compress(weight, moment)
    arb = Arb("arb", bitmap=False).compress(weight, moment)
    assert torch.equal(arb.salient, billm.salient)
    assert torch.equal(arb.groups, billm.groups)
    keep = torch.ones_like(weight, dtype=torch.bool)
    start = binarized_by_level(weight, keep, billm.salient[0], billm.groups)
    torch.testing.assert_close(billm.dense(), start, rtol=2e-3, atol=1e-2)
    assert (weight - arb.dense()).square().sum() < (weight - billm.dense()).square().sum()


@pytest.mark.parametrize("variant", ["arb", "x", "rc"])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 16), torch.full((3, 16), 0.5), torch.eye(3, 16) * 1e3, torch.full((3, 16), 1e-20)],
    ids=["zero", "constant", "sparse", "tiny"],
)
def test_degenerate_weights_give_finite_results_that_help(variant, weight):
    dense = Arb(variant, block=16).compress(weight, torch.eye(16)).dense()
    assert dense.isfinite().all()
    assert output_error(weight, dense, torch.eye(16)) <= 1
