import pytest
import torch

from pbsp.errors import ConfigError, PatternError
from pbsp.methods.pbsp import CHOICES, Pbsp
from pbsp.pruning.pattern import Pattern
from pbsp.solver.hessian import output_error
from pbsp.storage.layouts import is_packable


def problem(rows=24, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs = torch.randn(300, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 300


def assert_valid(result, pattern):
    kept = (result.signs.reshape(len(result.signs), -1, pattern.group) != 0).sum(2)
    assert (kept == pattern.kept).all()
    assert torch.equal(result.scalars.half().float(), result.scalars)
    assert torch.isfinite(result.dense()).all()
    assert (result.dense()[result.signs == 0] == 0).all()


@pytest.mark.parametrize("text", ["4:8", "5:8", "6:8", "8:8", "2:4", "4:16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_result_keeps_exactly_n_of_m_and_storable_scalars(text, rows):
    weight, moment = problem(rows=rows)
    pattern = Pattern.parse(text)
    assert_valid(Pbsp(pattern, block=32).compress(weight, moment), pattern)


PACKABLE = [(name, choice) for name in CHOICES for choice in CHOICES[name] if name != "pruning"]


@pytest.mark.parametrize(("name", "choice"), PACKABLE)
def test_every_choice_runs(name, choice):
    weight, moment = problem(rows=4)
    assert_valid(Pbsp(Pattern(4, 8), block=32, **{name: choice}).compress(weight, moment), Pattern(4, 8))


@pytest.mark.parametrize("steps", ["stepwise", "one-shot"])
@pytest.mark.parametrize("pruning", ["unstructured", "columns"])
def test_other_prunings_keep_the_same_share_of_every_block(pruning, steps):
    weight, moment = problem(rows=6)
    result = Pbsp(Pattern(3, 8), block=32, pruning=pruning, steps=steps).compress(weight, moment)
    kept = result.signs != 0
    assert (kept.view(6, 2, 32).sum(2) == 12).all()
    assert not is_packable(result)
    assert bool((kept == kept[:1]).all()) == (pruning == "columns")
    assert (kept.view(6, 8, 8).sum(2) != 3).any()


def test_the_freer_the_mask_the_lower_the_error():
    weight, moment = problem(rows=64)
    errors = [
        output_error(
            weight,
            Pbsp(Pattern(4, 8), block=32, score="hessian", steps="one-shot", pruning=pruning)
            .compress(weight, moment)
            .dense(),
            moment,
        )
        for pruning in ("unstructured", "n:m", "columns")
    ]
    assert errors == sorted(errors)


def test_with_fixed_signs_and_masks_the_step_path_leaves_no_trace():
    weight, moment = problem()
    fixed = {"refresh": False, "score": "hessian", "block": 64}
    stepwise = Pbsp(Pattern(4, 8), steps="stepwise", **fixed).compress(weight, moment)
    one_shot = Pbsp(Pattern(4, 8), steps="one-shot", **fixed).compress(weight, moment)
    torch.testing.assert_close(stepwise.dense(), one_shot.dense(), rtol=1e-3, atol=1e-3)
    slow = Pbsp(Pattern(4, 8), steps="stepwise", update="alternating", updates=300, **fixed)
    torch.testing.assert_close(slow.compress(weight, moment).dense(), one_shot.dense(), rtol=1e-2, atol=1e-2)


def test_refreshing_the_signs_lowers_the_error():
    weight, moment = problem(rows=64)
    errors = [
        output_error(
            weight, Pbsp(Pattern(6, 8), block=32, refresh=refresh).compress(weight, moment).dense(), moment
        )
        for refresh in (True, False)
    ]
    assert errors[0] < errors[1]


def test_informed_scores_beat_random_ones():
    weight, moment = problem(rows=64)
    errors = {
        score: output_error(
            weight, Pbsp(Pattern(4, 8), block=32, score=score).compress(weight, moment).dense(), moment
        )
        for score in ("random", "magnitude", "hessian", "residual")
    }
    assert max(errors["hessian"], errors["residual"]) < errors["magnitude"] < errors["random"]


@pytest.mark.parametrize("weight", [torch.zeros(3, 16), torch.full((3, 16), 0.5), torch.eye(3, 16) * 1e3])
def test_degenerate_weights_give_valid_finite_results(weight):
    assert_valid(Pbsp(Pattern(2, 4), block=16).compress(weight, torch.eye(16)), Pattern(2, 4))


def test_unknown_choices_and_untileable_rows_are_refused():
    with pytest.raises(ConfigError, match="score is 'best'; choose one of random"):
        Pbsp(Pattern(4, 8), score="best")
    with pytest.raises(ConfigError, match="updates is 0"):
        Pbsp(Pattern(4, 8), updates=0)
    with pytest.raises(PatternError):
        Pbsp(Pattern(4, 7), block=7).compress(*problem())
