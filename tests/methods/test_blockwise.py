from dataclasses import replace

import pytest
import torch

from pbsp.binarization.grouped import GroupedBinarization, Scheme
from pbsp.binarization.grouped_fit import BlockFit
from pbsp.binarization.partition import magnitude_groups
from pbsp.errors import CalibrationError, PatternError
from pbsp.methods.blockwise import fit_blocks, join_fits, stored
from pbsp.methods.table import build_method, patterns_of
from pbsp.pruning.pattern import Pattern
from pbsp.solver.hessian import damped, inverse_factor
from variants import VARIANTS, layer_problem

GROUPED = [
    (name, options) for name, options in VARIANTS if name not in ("planes", "gptq", "integers", "nanoquant")
]


def fit_of(problem, scheme=None, *, seed=0):
    """A fit of any scheme on a random mask and random salient columns."""
    scheme = scheme or Scheme(2, 1)
    target = problem.inputs.weight
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(target.shape, generator=generator) < 0.7
    salient = torch.rand(target.shape[1], generator=generator) < (0.3 if scheme.salient_groups else 0)
    fit = BlockFit.start(target, keep, salient, magnitude_groups(target, keep, groups=scheme.groups), scheme)
    if scheme.means:
        return fit
    return replace(fit, column_scales=torch.rand(scheme.scalars, target.shape[1], generator=generator))


def solve(weight, moment, fit_block, **settings):
    settings = {"pattern": None, "block": 32, "damping": 0.01, "compensation": "exact", **settings}
    return fit_blocks(weight, moment, fit_block, **settings)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(1, 0), Scheme(2, 1), Scheme(2, 2, means=False)], ids=str)
def test_dense_equals_what_the_blocks_were_fitted_to_be(scheme):
    fits = []

    def fit_block(problem):
        fits.append(fit_of(problem, scheme, seed=len(fits)))
        return fits[-1]

    result = solve(*layer_problem(7, 80), fit_block)
    assert [fit.keep.shape[1] for fit in fits] == [32, 32, 16]
    torch.testing.assert_close(
        result.dense(), torch.cat([stored(fit).dense() for fit in fits], 1), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(result.signs != 0, torch.cat([fit.keep for fit in fits], 1))
    assert result.scalars.shape == (7, 3, scheme.scalars)
    assert result.scheme == scheme


def test_blocks_see_moved_targets_and_their_part_of_the_problem():
    weight, moment = layer_problem(5, 80, dtype=torch.float64)
    hessian = damped(moment, 0.01)
    factor = inverse_factor(hessian)
    seen = []

    def fit_block(problem):
        seen.append(problem)
        return fit_of(problem)

    result = solve(weight, moment, fit_block, seed=5)
    error = seen[0].inputs.weight - stored(fit_of(seen[0])).dense()
    shift = (
        torch.linalg.solve_triangular(factor[:32, :32], error, upper=True, left=False) @ factor[:32, 32:64]
    )
    torch.testing.assert_close(seen[0].inputs.weight, weight[:, :32])
    torch.testing.assert_close(seen[1].inputs.weight, weight[:, 32:64] - shift)
    for number, problem in enumerate(seen):
        assert problem.inputs.seed == 5 + number
        part = problem.columns
        torch.testing.assert_close(problem.metric, hessian[part, part])
        torch.testing.assert_close(problem.inputs.energy, moment.diagonal()[part])
        torch.testing.assert_close(problem.inputs.factor_diagonal, factor.diagonal()[part])
        torch.testing.assert_close(
            torch.linalg.inv(problem.compensated), factor[part, part].T @ factor[part, part]
        )
    assert result.dense().dtype == torch.float32


def test_what_pruned_weights_and_other_columns_have_is_not_stored():
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    keep, salient = weight > -0.5, torch.arange(16) < 5
    groups = torch.ones(4, 16, dtype=torch.uint8)
    matrix = join_fits([BlockFit.start(weight, keep, salient, groups)], pattern=None, block=16)
    assert torch.equal(matrix.signs != 0, keep)
    assert torch.equal(matrix.residual_signs != 0, keep & salient)
    assert torch.equal(matrix.groups != 0, keep & ~salient)


@pytest.mark.parametrize(("name", "options"), GROUPED)
@pytest.mark.parametrize(("compensation", "columns", "block"), [("exact", 80, 128), ("diagonal", 80, 32)])
def test_every_method_keeps_its_pattern_and_storable_scalars(name, options, compensation, columns, block):
    options = {"block": block, **options} | ({} if name == "rtn" else {"compensation": compensation})
    method = build_method(name, None, options)
    weight, moment = layer_problem(4, columns)
    before = weight.clone(), moment.clone()
    result = method.compress(weight, moment)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
    assert result.scalars.shape[:2] == (4, -(-columns // block))
    assert torch.equal(result.scalars.half().float(), result.scalars)
    kept = result.signs != 0
    assert (result.dense()[~kept] == 0).all()
    if result.pattern is None:
        assert kept.all()
    else:
        assert (result.pattern,) == patterns_of(method)
        assert (kept.view(4, -1, result.pattern.group).sum(2) == result.pattern.kept).all()


@pytest.mark.parametrize(("name", "options"), GROUPED)
def test_rows_of_a_fused_layer_come_apart_and_together(name, options):
    method = build_method(name, None, {"block": 16, **options})
    whole = method.compress(*layer_problem(12, 40))
    parts = whole.split([6, 3, 3])
    dense = whole.dense()
    for part, rows in zip(parts, dense.split([6, 3, 3]), strict=True):
        assert torch.equal(part.dense(), rows)
    assert torch.equal(GroupedBinarization.join(parts).dense(), dense)
    others = [method.compress(*layer_problem(rows, 40, seed=rows)) for rows in (4, 2)]
    joined = GroupedBinarization.join([whole, *others])
    assert torch.equal(joined.dense(), torch.cat([dense, *(other.dense() for other in others)]))
    assert joined.nominal_bits == pytest.approx(
        sum(p.nominal_bits * len(p.signs) for p in (whole, *others)) / 18
    )


@pytest.mark.parametrize("columns", [1, 31, 32, 33])
def test_any_width_is_cut_into_blocks(columns):
    weight, moment = layer_problem(3, columns)
    result = solve(weight, moment, lambda problem: fit_of(problem, Scheme(1, 0)))
    assert result.signs.shape == (3, columns)
    assert result.scalars.shape[1] == -(-columns // 32)


def test_a_block_wider_than_the_matrix_costs_no_memory_for_columns_that_are_not_there():
    weight, moment = layer_problem(3, 16)
    result = build_method("rtn", None, {"block": 10**12}).compress(weight, moment)
    assert torch.equal(result.dense(), build_method("rtn").compress(weight, moment).dense())


def test_problems_that_cannot_be_solved_are_refused():
    weight, moment = layer_problem(3, 20)
    with pytest.raises(PatternError, match="4 left over"):
        solve(weight, moment, fit_of, pattern=Pattern(4, 8))
    moment[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        solve(weight, moment, fit_of)
