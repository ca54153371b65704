import pytest
import torch

from oracles import binarized_by_level
from pbsp.errors import PatternError
from pbsp.methods.stbllm import Stbllm
from pbsp.pruning.pattern import Pattern
from pbsp.solver.hessian import output_error
from pbsp.storage.counting import count_bits, streams
from pbsp.storage.layouts import pack
from variants import layer_problem


def importance(weight, moment):
    """(|w|/Σ column + |w|/Σ row)·‖x‖^½ of the first block, weight by weight."""
    size = weight.abs().tolist()
    columns = [sum(row[j] for row in size) for j in range(weight.shape[1])]
    norms = [float(moment[j, j]) ** 0.25 for j in range(weight.shape[1])]
    return [
        [(value / columns[j] + value / sum(row)) * norms[j] for j, value in enumerate(row)] for row in size
    ]


def largest_of_groups(scores, pattern):
    keep = torch.zeros(len(scores), len(scores[0]), dtype=torch.bool)
    for i, row in enumerate(scores):
        for low in range(0, len(row), pattern.group):
            best = sorted(range(low, low + pattern.group), key=row.__getitem__)[-pattern.kept :]
            keep[i, best] = True
    return keep


@pytest.mark.parametrize("text", ["4:8", "6:8", "1:4"])
def test_weights_of_the_first_block_are_kept_by_standardized_importance(text):
    pattern = Pattern.parse(text)
    weight, moment = layer_problem(8, 64)
    result = Stbllm(pattern, block=32).compress(weight, moment)
    keep = largest_of_groups(importance(weight[:, :32], moment), pattern)
    assert torch.equal(result.signs[:, :32] != 0, keep)


@pytest.mark.parametrize("text", ["4:8", "6:8"])
@pytest.mark.parametrize("compensation", ["exact", "diagonal", "none"])
def test_pruned_weights_stay_zero_and_n_of_m_are_kept(text, compensation):
    weight, moment = layer_problem(6, 192)
    pattern = Pattern.parse(text)
    result = Stbllm(pattern, compensation=compensation).compress(weight, moment)
    keep = result.signs != 0
    assert (keep.view(6, -1, 8).sum(2) == pattern.kept).all()
    assert (result.dense()[~keep] == 0).all()
    assert torch.equal(result.scalars.half().float(), result.scalars)
    assert set(result.groups.unique().tolist()) == {0, 1, 2}


def test_every_block_is_the_base_binarizer_of_its_groups():
    weight, moment = layer_problem(6, 80)
    result = Stbllm(block=32, compensation="none").compress(weight, moment)
    keep = result.signs != 0
    parts = [slice(low, low + 32) for low in range(0, 80, 32)]
    expected = [
        binarized_by_level(weight[:, p], keep[:, p], result.salient[0, p], result.groups[:, p]) for p in parts
    ]
    torch.testing.assert_close(result.dense(), torch.cat(expected, 1), rtol=2e-3, atol=1e-2)


def test_released_zeros_are_binarized_as_the_small_weights_they_are():
    weight, moment = layer_problem(6, 80)
    settings = {"block": 32, "compensation": "none"}
    kept = Stbllm(**settings).compress(weight, moment).signs != 0
    result = Stbllm(**settings, zeros="released").compress(weight, moment)
    assert result.pattern is None
    assert (result.signs != 0).all()
    assert (result.groups[~kept] == 0).all()  # the group of small magnitudes
    everything = torch.ones_like(kept)
    parts = [slice(low, low + 32) for low in range(0, 80, 32)]
    expected = [
        binarized_by_level((weight * kept)[:, p], everything[:, p], result.salient[0, p], result.groups[:, p])
        for p in parts
    ]
    torch.testing.assert_close(result.dense(), torch.cat(expected, 1), rtol=2e-3, atol=1e-2)


def test_released_zeros_cost_more_bits_and_more_error():
    weight, moment = layer_problem(16, 192)
    kept = Stbllm().compress(weight, moment)
    released = Stbllm(zeros="released").compress(weight, moment)
    assert (kept.dense() == 0).float().mean() == 0.5
    assert (released.dense() == 0).float().mean() < 0.01  # where a row's small weights were all pruned
    assert released.nominal_bits == pytest.approx(1 + float(released.salient.float().mean()))
    assert 0.5 < kept.nominal_bits < 1
    assert output_error(weight, kept.dense(), moment) < output_error(weight, released.dense(), moment)
    sizes = {stream.kind: stream.numbers.numel() for stream in streams(released)}
    once = int((~released.salient).sum()) * 16
    assert sizes == {
        "signs": 16 * 192,
        "groups": once,
        "residual signs": 16 * 192 - once,
        "salient columns": 192,
        "scalars": 16 * 2 * 9,
    }
    assert count_bits(released) == 16 * 192 + 2 * once + (16 * 192 - once) + 192 + 16 * 16 * 2 * 9


def test_kept_zeros_are_packed_and_come_back():
    weight, moment = layer_problem(6, 192)
    result = Stbllm().compress(weight, moment)
    packed = pack(result)
    packed.check()
    assert torch.equal(packed.decode(), result.dense())
    assert count_bits(result) == sum(8 * tensor.nbytes for tensor in packed.tensors().values())


def test_rows_that_do_not_tile_are_refused():
    weight, moment = layer_problem(3, 20)
    for zeros in ("kept", "released"):
        with pytest.raises(PatternError, match="4 left over"):
            Stbllm(zeros=zeros).compress(weight, moment)
