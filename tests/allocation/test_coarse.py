import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbsp.allocation.coarse import coarse_allocation, coarse_plan
from pbsp.allocation.plan import uniform_plan
from pbsp.errors import ConfigError, PatternError
from pbsp.models.blocks import decoder_blocks
from pbsp.pruning.pattern import Pattern
from tiny import tiny_model


def falling(count):
    """Importances of `count` blocks, the first the most important."""
    return [1 - index / count for index in range(count)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [4]),
        (2, [5, 3]),
        (3, [5, 4, 3]),
        (5, [5, 5, 4, 3, 3]),  # 5, 4½, 4, 3½, 3: rounded up twice, the fourth lowered again
        (17, [5] * 5 + [4] * 7 + [3] * 5),
        (32, [5] * 8 + [4] * 16 + [3] * 8),
    ],
)
def test_kept_falls_with_the_rank_as_computed_by_hand(count, expected):
    assert list(coarse_allocation(falling(count), 4, 8).kept) == expected


@pytest.mark.parametrize("spread", [0, 1, 2, 3])
@pytest.mark.parametrize("count", range(1, 50))
def test_average_is_exact_and_n_never_rises_with_the_rank(count, spread):
    kept = list(coarse_allocation(falling(count), 4, 8, spread=spread).kept)
    assert sum(kept) == 4 * count
    assert kept == sorted(kept, reverse=True)
    assert set(kept) <= set(range(4 - spread, 4 + spread + 1))


def test_blocks_are_ranked_by_importance_wherever_they_stand():
    coarse = coarse_allocation([0.1, 0.9, 0.3, 1.4], 4, 8)
    assert coarse.ranks == (4, 2, 3, 1)
    assert coarse.kept == (3, 4, 4, 5)


def test_the_earlier_of_two_equally_important_blocks_ranks_higher():
    assert coarse_allocation([0.5] * 5, 4, 8).ranks == (1, 2, 3, 4, 5)
    assert coarse_allocation([0.2, 0.5, 0.5], 4, 8).ranks == (3, 1, 2)


def test_a_block_that_turns_its_input_around_is_the_most_important():
    cosines = [0.2, -0.3, 0.9, 0.0]
    assert coarse_allocation([1 - cosine for cosine in cosines], 4, 8).ranks == (3, 1, 4, 2)


@pytest.mark.parametrize(("kept", "group"), [(1, 4), (4, 4)])
def test_no_spread_where_n_is_at_its_limit(kept, group):
    assert list(coarse_allocation(falling(6), kept, group).kept) == [kept] * 6


@pytest.mark.parametrize("spread", [-1, 3])
def test_a_spread_out_of_range_is_refused(spread):
    with pytest.raises(ConfigError, match="at most 2"):
        coarse_allocation(falling(6), 3, 8, spread=spread)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([100, 1, 1, 1], [4, 3, 3, 3]),  # a large important block cannot be paid for by small ones
        ([1, 1, 1, 100], [5, 4, 4, 3]),
        ([2, 1, 1, 1], [5, 4, 3, 3]),
    ],
)
def test_average_weighted_by_size_is_not_above_n(sizes, expected):
    kept = list(coarse_allocation(falling(4), 4, 8, sizes=sizes).kept)
    assert sum(n * size for n, size in zip(kept, sizes, strict=True)) <= 4 * sum(sizes)
    assert kept == expected


def test_coarse_plan_gives_all_linears_of_a_block_its_pattern():
    blocks = decoder_blocks(tiny_model())
    plan, coarse = coarse_plan(blocks, Pattern(4, 8), [0.1, 0.2], rule="paper", strict=True)
    assert coarse.kept == (3, 5)
    for block, kept in zip(blocks, coarse.kept, strict=True):
        assert {plan.entries[name] for name in block.linears()} == {(Pattern(kept, 8),)}
    assert list(plan.entries) == list(uniform_plan(blocks, (Pattern(4, 8),), strict=True).entries)


def test_a_weight_in_two_blocks_keeps_the_pattern_of_its_first():
    model = tiny_model()
    first, second = (model.model.layers[index].mlp for index in (0, 1))
    second.up_proj.weight = first.up_proj.weight
    plan, _ = coarse_plan(decoder_blocks(model), Pattern(4, 8), [0.9, 0.2], rule="paper", strict=True)
    assert plan.same_as == {"model.layers.1.mlp.up_proj": "model.layers.0.mlp.up_proj"}
    # the second block is smaller by the shared weight, so its 3:8 no longer pays for the first's 5:8
    assert plan.entries["model.layers.1.mlp.up_proj"] == plan.entries["model.layers.0.mlp.up_proj"]
    assert plan.entries["model.layers.0.mlp.up_proj"] == (Pattern(4, 8),)


def test_coarse_plan_refuses_what_no_layer_can_take():
    with pytest.raises(PatternError, match="no layer can take 3:7"):
        coarse_plan(decoder_blocks(tiny_model()), Pattern(3, 7), [0.9, 0.2], rule="paper", strict=False)


def test_outliers_draw_the_line_by_value_and_keep_the_average():
    coarse = coarse_allocation([0.0, 0.1, 0.2, 1.0], 4, 8, rule="outliers", spread=2)
    assert coarse.ranks == (4, 3, 2, 1)
    assert sum(coarse.kept) == 16
    assert coarse.kept[3] == max(coarse.kept) > coarse.kept[0] == min(coarse.kept) >= 2


def test_equal_outlier_ratios_give_a_uniform_allocation():
    assert coarse_allocation([0.3] * 5, 4, 8, rule="outliers").kept == (4,) * 5


@pytest.mark.parametrize("seed", range(10))
def test_outlier_allocations_fall_with_the_ratio_and_never_exceed_the_average(seed):
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.rand(17, generator=generator).tolist()
    coarse = coarse_allocation(ratios, 5, 8, rule="outliers", spread=2)
    by_importance = [coarse.kept[block] for block in sorted(range(17), key=lambda block: -ratios[block])]
    assert by_importance == sorted(by_importance, reverse=True)
    assert sum(coarse.kept) == 5 * 17


@pytest.mark.parametrize(
    ("ratios", "spread", "expected"),
    [
        ([1.0, 0.5, 0.0], 1, (5, 4, 3)),
        ([0.0, 1.0, 0.5], 1, (3, 5, 4)),
        ([1.0, 0.0, 0.0, 0.0], 1, (5, 4, 4, 3)),  # 5½ is cut to 5; 3½ rounds up, and the last is lowered
        ([1.0, 1.0, 1.0, 0.0], 1, (5, 4, 4, 3)),  # 4½ rounds up, 2½ is cut to 3; two are lowered again
        ([0.6, 0.5, 0.5, 0.5], 2, (6, 4, 3, 3)),  # 7 is cut to 6, 3 three times: one is raised
        ([0.7], 2, (4,)),
        ([0.2, 0.1], 0, (4, 4)),
    ],
)
def test_outlier_allocations_computed_by_hand(ratios, spread, expected):
    coarse = coarse_allocation(ratios, 4, 8, rule="outliers", spread=spread)
    assert coarse.kept == expected
    assert coarse.rule == "outliers"
    assert coarse.importances == tuple(ratios)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_outlier_ratios_give_falling_n_and_an_average_that_cannot_be_raised(data):
    ratios = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=8))
    equal = data.draw(st.booleans())
    sizes = [1 if equal else data.draw(st.sampled_from([1, 2, 3, 50])) for _ in ratios]
    kept, group = data.draw(st.sampled_from([(4, 8), (5, 8), (2, 4), (7, 8), (8, 8)]))
    spread = data.draw(st.integers(0, min(kept - 1, group - kept)))
    chosen = coarse_allocation(ratios, kept, group, rule="outliers", spread=spread, sizes=sizes).kept
    order = sorted(range(len(ratios)), key=lambda block: -ratios[block])
    falling_kept = [chosen[block] for block in order]
    assert falling_kept == sorted(falling_kept, reverse=True)
    assert set(chosen) <= set(range(kept - spread, kept + spread + 1))
    left = sum(size * (kept - n) for size, n in zip(sizes, chosen, strict=True))
    assert left >= 0
    if equal:
        assert left == 0
    highest = [kept + spread, *falling_kept]
    for position, block in enumerate(order):
        assert falling_kept[position] == highest[position] or sizes[block] > left


def test_coarse_plan_follows_the_rule():
    blocks = decoder_blocks(tiny_model())
    plan, coarse = coarse_plan(blocks, Pattern(4, 8), [0.01, 0.03], rule="outliers", strict=True, spread=2)
    assert coarse.kept == (2, 6)
    for block, kept in zip(blocks, coarse.kept, strict=True):
        assert {plan.entries[name] for name in block.linears()} == {(Pattern(kept, 8),)}
