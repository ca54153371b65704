from itertools import pairwise

import pytest
import torch

from oracles import binarized_by_level, salient_count_by_trying
from pbsp.errors import CalibrationError, PatternError
from pbsp.methods.billm import Billm
from pbsp.pruning.keep import keep_largest
from pbsp.pruning.pattern import Pattern
from pbsp.solver.hessian import damped, inverse_factor, output_error
from variants import layer_problem


def saliency(weight, moment):
    return weight.square() / inverse_factor(damped(moment, 0.01)).float().diagonal().square()


def heavy_problem(rows=12, columns=48, seed=0):
    """As real layers: a few columns are far larger than the rest."""
    weight, moment = layer_problem(rows, columns, seed=seed)
    weight[:, [3, 17, 30]] *= 5
    return weight, moment


@pytest.mark.parametrize("pattern", [None, Pattern(4, 8), Pattern(2, 4)])
def test_every_block_is_the_base_binarizer_of_its_groups(pattern):
    weight, moment = heavy_problem(8, 80)
    result = Billm(pattern, block=32, compensation="none").compress(weight, moment)
    keep = result.signs != 0
    assert result.salient.any()
    parts = [slice(low, low + 32) for low in range(0, 80, 32)]
    expected = [
        binarized_by_level(weight[:, p], keep[:, p], result.salient[0, p], result.groups[:, p]) for p in parts
    ]
    torch.testing.assert_close(result.dense(), torch.cat(expected, 1), rtol=2e-3, atol=1e-2)
    assert torch.equal(result.scalars.half().float(), result.scalars)


@pytest.mark.parametrize("pattern", [None, Pattern(5, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_salient_columns_are_the_count_with_the_least_error_of_all(pattern, seed):
    weight, moment = heavy_problem(seed=seed)
    result = Billm(pattern).compress(weight, moment)
    keep, scores = result.signs != 0, saliency(weight, moment)
    order = (scores * keep).sum(0).argsort(descending=True, stable=True)
    losses = salient_count_by_trying(weight, keep, order, 24)
    taken = result.salient[0].nonzero()[:, 0].tolist()
    assert sorted(order[: len(taken)].tolist()) == taken
    assert losses[len(taken)] == pytest.approx(min(losses), rel=1e-5)
    assert 0 < len(taken) <= 24


@pytest.mark.parametrize("pattern", [None, Pattern(5, 8)])
def test_no_split_of_the_other_weights_leaves_less_error(pattern):
    weight, moment = heavy_problem(seed=1)
    result = Billm(pattern).compress(weight, moment)
    size = weight.abs()
    others = (result.signs != 0) & ~result.salient

    def error(groups):
        """Of a binarization without a mean, as both searches compare."""
        members = [(row, others[i] & (groups[i] == g)) for i, row in enumerate(size) for g in (0, 1)]
        return sum(float((row[m] - row[m].mean()).square().sum()) for row, m in members if m.any())

    largest = float((size * others).max())
    candidates = [error(size >= largest * split / 64) for split in range(1, 64)]
    assert error(result.groups) == pytest.approx(min(candidates), rel=1e-5)
    assert min(candidates) < 0.9 * error(torch.zeros_like(result.groups))


def test_masks_by_hand_in_the_first_block_keep_n_of_m_everywhere():
    weight, moment = heavy_problem(8, 192)
    result = Billm(Pattern(4, 8)).compress(weight, moment)
    keep = result.signs != 0
    assert torch.equal(keep[:, :128], keep_largest(saliency(weight, moment), 4, 8)[:, :128])
    assert (keep.view(8, -1, 8).sum(2) == 4).all()
    assert (result.dense()[~keep] == 0).all()
    by_magnitude = Billm(Pattern(4, 8), score="magnitude").compress(weight, moment)
    assert torch.equal((by_magnitude.signs != 0)[:, :128], keep_largest(weight.abs(), 4, 8)[:, :128])


def test_last_block_of_a_row_may_be_narrower_than_the_others():
    weight, moment = heavy_problem(6, 192)
    result = Billm().compress(weight, moment)
    assert result.scalars.shape == (6, 2, 7)
    assert (result.signs != 0).all()
    assert int(result.salient[0, :128].sum()) <= 50
    assert int(result.salient[0, 128:].sum()) <= 32


def test_salient_columns_and_groups_earn_their_bits():
    errors = {"none": 0.0, "diagonal": 0.0, "exact": 0.0}
    for seed in range(6):
        weight, moment = heavy_problem(32, 96, seed=seed)
        for mode in errors:
            errors[mode] += output_error(
                weight, Billm(block=16, compensation=mode).compress(weight, moment).dense(), moment
            )
    assert all(better < worse for better, worse in pairwise(reversed(errors.values())))


def test_nominal_bits_count_salient_columns_twice():
    weight, moment = heavy_problem()
    result = Billm().compress(weight, moment)
    assert result.nominal_bits == pytest.approx(1 + float(result.salient.float().mean()))


@pytest.mark.parametrize("weight", [torch.zeros(3, 16), torch.full((3, 16), 0.5), torch.eye(3, 16) * 1e3])
def test_degenerate_weights_give_finite_results_that_help(weight):
    dense = Billm(Pattern(2, 4), block=16).compress(weight, torch.eye(16)).dense()
    assert dense.isfinite().all()
    assert output_error(weight, dense, torch.eye(16)) <= 1


def test_rows_that_do_not_tile_and_moments_that_are_not_finite_are_refused():
    weight, moment = layer_problem(3, 20)
    with pytest.raises(PatternError, match="4 left over"):
        Billm(Pattern(4, 8)).compress(weight, moment)
    moment[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        Billm().compress(weight, moment)
