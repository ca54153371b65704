import pytest
import torch

from oracles import binarized_by_level, sparsegpt_by_reinversion
from pbsp.errors import CalibrationError, PatternError
from pbsp.methods.prune_then_binarize import PruneThenBinarize, sparsegpt
from pbsp.methods.rtn import Rtn
from pbsp.pruning.pattern import Pattern
from pbsp.solver.hessian import damped, inverse_factor, output_error
from variants import layer_problem

PRUNERS = ("sparsegpt", "wanda", "magnitude", "si", "hessian", "random")


def plain(weight, keep, block):
    """All kept weights of a row in a block are one group."""
    none = torch.zeros(weight.shape[1], dtype=torch.bool)
    parts = range(0, weight.shape[1], block)
    return torch.cat(
        [
            binarized_by_level(weight[:, p : p + block], keep[:, p : p + block], none, torch.zeros_like(keep))
            for p in parts
        ],
        1,
    )


@pytest.mark.parametrize("text", ["4:8", "2:4", "1:4", "8:8", "5:7", "1:1"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_sparsegpt_equals_reinversion_column_by_column(text, damping):
    pattern = Pattern.parse(text)
    weight, moment = layer_problem(7, 3 * pattern.group, dtype=torch.float64)
    hessian = damped(moment, damping)
    pruned, keep = sparsegpt(weight, inverse_factor(hessian), pattern)
    expected, expected_keep = sparsegpt_by_reinversion(weight, hessian, pattern)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-8)


def test_sparsegpt_prunes_exactly_and_moves_what_it_keeps():
    weight, moment = layer_problem(16, 264)  # several panels of 128 columns, and a rest
    before = weight.clone()
    pruned, keep = sparsegpt(weight, inverse_factor(damped(moment, 0.01)).float(), Pattern(4, 8))
    assert torch.equal(weight, before)
    assert (pruned[~keep] == 0).all()
    assert (keep.view(16, -1, 8).sum(2) == 4).all()
    assert torch.equal(keep[:, 0] * weight[:, 0], pruned[:, 0])  # nothing stands before it
    moved = (pruned != weight)[keep].float().mean()
    assert moved > 0.9
    assert output_error(weight, pruned, moment) < 0.5 * output_error(weight, weight * keep, moment)


def test_masks_by_hand():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5], [-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.1]])
    moment = torch.diag(torch.tensor([16.0, 1.0, 1.0, 4.0]))

    def kept(pruner):
        result = PruneThenBinarize(Pattern(2, 4), pruner, block=4).compress(weight, moment)
        return [row.nonzero()[:, 0].tolist() for row in result.signs]

    assert kept("magnitude") == [[1, 2], [0, 1], [0, 3]]  # ties go to the lowest index
    assert kept("wanda") == [[0, 1], [0, 3], [0, 3]]  # 4, 3, 2, 1
    # 1/U_jj² is the hessian's diagonal here: w² times it, as Wanda's squared
    assert kept("hessian") == kept("sparsegpt") == kept("wanda")


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("block", [48, 128, 192, 400])
def test_result_is_the_base_binarizer_on_the_pruned_matrix(pruner, block):
    weight, moment = layer_problem(4, 192)
    result = PruneThenBinarize(Pattern(4, 8), pruner, block=block).compress(weight, moment)
    keep = result.signs != 0
    assert (keep.view(4, -1, 8).sum(2) == 4).all()
    pruned = weight
    if pruner == "sparsegpt":
        pruned, expected = sparsegpt(weight, inverse_factor(damped(moment, 0.01)).float(), Pattern(4, 8))
        assert torch.equal(keep, expected)
    torch.testing.assert_close(result.dense(), plain(pruned, keep, block), rtol=2e-3, atol=4e-3)
    assert (result.dense()[~keep] == 0).all()


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("compensation", ["exact", "diagonal"])
def test_pruned_weights_stay_zero_under_compensation(pruner, compensation):
    weight, moment = layer_problem(8, 96)
    bare, swept = (
        PruneThenBinarize(Pattern(2, 4), pruner, block=16, compensation=mode).compress(weight, moment)
        for mode in ("none", compensation)
    )
    assert torch.equal(bare.signs != 0, swept.signs != 0)  # the mask is chosen before
    assert (swept.dense()[swept.signs == 0] == 0).all()
    assert not torch.equal(bare.dense(), swept.dense())
    if compensation == "exact" and pruner != "random":  # what binarizing costs is absorbed, not the pruning
        assert output_error(weight, swept.dense(), moment) < output_error(weight, bare.dense(), moment)


def test_keeping_all_weights_is_plain_binarization():
    weight, moment = layer_problem()
    for pruner in PRUNERS:
        result = PruneThenBinarize(Pattern(8, 8), pruner, block=16).compress(weight, moment)
        assert torch.equal(result.dense(), Rtn(16).compress(weight, moment).dense())


def test_rows_that_do_not_tile_and_moments_that_are_not_finite_are_refused():
    weight, moment = layer_problem(3, 20)
    with pytest.raises(PatternError, match="4 left over"):
        PruneThenBinarize(Pattern(4, 8)).compress(weight, moment)
    moment[3, 3] = float("inf")
    with pytest.raises(CalibrationError, match="infinite"):
        PruneThenBinarize(Pattern(2, 4)).compress(weight, moment)
