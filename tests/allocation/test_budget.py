import itertools
import random

import pytest

from pbsp.allocation.budget import Choice, allocate
from pbsp.errors import ConfigError


def totals(choices, chosen):
    picked = [part[index] for part, index in zip(choices, chosen, strict=True)]
    return sum(choice.bits for choice in picked), sum(choice.loss for choice in picked)


def best_loss(choices, budget):
    """Every combination tried."""
    every = itertools.product(*(range(len(part)) for part in choices))
    return min(loss for bits, loss in (totals(choices, chosen) for chosen in every) if bits <= budget)


def random_choices(generator, parts=4, options=4):
    return [
        [
            Choice(bits, 10.0 * generator.random() * 0.5**bits + 0.01 * generator.random())
            for bits in sorted(generator.sample(range(1, 13), options))
        ]
        for _ in range(parts)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_never_over_budget_and_within_one_step_of_the_best(seed):
    generator = random.Random(seed)
    choices = random_choices(generator)
    smallest = sum(min(part).bits for part in choices)
    for budget in range(smallest, smallest + 30, 3):
        bits, loss = totals(choices, allocate(choices, budget))
        assert bits <= budget
        # What the greedy choice can lack is what its last step, which did not fit, would have brought.
        largest = max(a.loss - b.loss for part in choices for a, b in itertools.combinations(part, 2))
        assert best_loss(choices, budget) <= loss <= best_loss(choices, budget) + largest


def test_with_convex_costs_it_is_the_optimum_at_the_budgets_it_reaches():
    choices = [[Choice(bits, weight * 2.0**-bits) for bits in (1, 2, 3, 4)] for weight in (1.0, 4.0, 9.0)]
    for budget in range(3, 13):
        assert totals(choices, allocate(choices, budget))[1] == pytest.approx(best_loss(choices, budget))


def test_a_worse_but_larger_choice_is_never_taken():
    choices = [[Choice(1, 1.0), Choice(2, 3.0), Choice(3, 0.5)], [Choice(1, 1.0), Choice(2, 1.0)]]
    assert allocate(choices, 100) == [2, 0]


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(ConfigError, match="2 bits below the smallest"):
        allocate([[Choice(3, 1.0)], [Choice(4, 1.0)]], 5)
