import pytest
import torch

from oracles import binarized_by_hand
from pbsp.methods.rtn import Rtn
from pbsp.storage.counting import count_bits
from variants import layer_problem


def by_loop(weight, block):
    rows = [
        [value for low in range(0, len(row), block) for value in binarized_by_hand(row[low : low + block])]
        for row in weight.tolist()
    ]
    return torch.tensor(rows, dtype=weight.dtype)


@pytest.mark.parametrize(("columns", "block"), [(1, 128), (47, 48), (48, 48), (49, 48), (192, 128), (20, 1)])
def test_every_block_of_a_row_equals_the_base_binarizer(columns, block):
    weight, moment = layer_problem(5, columns)
    result = Rtn(block).compress(weight, moment)
    torch.testing.assert_close(
        result.dense(), by_loop(weight, block), rtol=2e-3, atol=2e-3
    )  # float16 scalars
    assert torch.equal(result.scalars.half().float(), result.scalars)


def test_scalars_are_mean_and_mean_magnitude_and_zero_counts_as_positive():
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    result = Rtn().compress(weight, torch.eye(4))
    assert result.scalars.tolist() == [[[0.5, 0.0]], [[2.0, 2.0]], [[0.0, 2.0]]]
    assert result.signs.tolist() == [[1, -1, 1, 1], [1, -1, -1, 1], [1, 1, 1, 1]]
    assert result.dense().tolist() == [[0.5, -0.5, 0.5, 0.5], [4, 0, 0, 4], [2, 2, 2, 2]]


def test_the_moment_is_not_looked_at():
    weight, moment = layer_problem()
    assert torch.equal(
        Rtn(16).compress(weight, moment).dense(), Rtn(16).compress(weight, moment * float("nan")).dense()
    )


def test_it_takes_a_bit_a_weight_and_two_scalars_a_block():
    weight, moment = layer_problem(6, 192)
    result = Rtn().compress(weight, moment)
    assert result.nominal_bits == 1
    assert count_bits(result) == 6 * (192 + 2 * 2 * 16)
