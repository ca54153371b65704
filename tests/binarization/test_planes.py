import pytest
import torch

from pbsp.binarization.planes import SCALE_BLOCK, block_count, even_block, signs_of


@pytest.mark.parametrize(
    ("columns", "block", "width", "blocks"),
    [
        (576, 640, 576, 1),
        (896, 640, 448, 2),
        (1536, 640, 512, 3),
        (4096, 640, 640, 7),
        (11008, 640, 640, 18),
        (40, 640, 64, 1),
        (576, 128, 128, 5),
        (576, 500, 320, 2),
        (72, 16, 16, 5),
        (100, 30, 30, 4),
    ],
)
def test_rows_are_divided_evenly(columns, block, width, blocks):
    assert even_block(columns, block) == width
    assert block_count(columns, width) == blocks


@pytest.mark.parametrize("groups", [(8,), (16, 8), (6,), (5, 8), (128,)])
@pytest.mark.parametrize("columns", [960, 3840, 7680])
def test_blocks_are_whole_groups_no_wider_and_no_more_than_asked(groups, columns):
    for block in (240, 960, 1920):
        if all(block % group == 0 for group in groups):
            width = even_block(columns, block, *groups)
            assert width <= block
            assert all(width % group == 0 for group in groups)
            assert block_count(columns, width) <= block_count(columns, block)


def test_the_default_holds_the_groups_that_are_usual():
    assert all(SCALE_BLOCK % group == 0 for group in (1, 4, 8, 10, 16, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_zeros_count_as_positive(dtype):
    values = torch.tensor([[-3.0, -0.0, 0.0], [2.0, float("-inf"), 1e-6]], dtype=dtype)
    before = values.clone()
    found = signs_of(values.requires_grad_())
    torch.testing.assert_close(found, torch.tensor([[-1, 1, 1], [1, -1, 1]], dtype=dtype), rtol=0, atol=0)
    assert torch.equal(values, before), "they are left as they were"
