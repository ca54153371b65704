import pytest
import torch

from pbsp.binarization.rotation import rotate
from pbsp.methods.integers import IntegerFit
from pbsp.methods.planes import PlaneFit
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import parse_patterns
from pbsp.recovery.tuned_planes import TunedPlanes, codes_of, first_latents
from variants import layer_problem


def planes(rows=6, columns=40, block=16, text="2:8+1:8"):
    weight, moment = layer_problem(rows=rows, columns=columns)
    return PlaneFit(parse_patterns(text), block=block, sweeps=1).compress(weight, moment), weight


def shaken(tuned, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tuned.change.copy_(torch.randn(tuned.change.shape, generator=generator))
        if tuned.latents is not None:
            tuned.latents.add_(torch.randn(tuned.latents.shape, generator=generator))
    tuned.refresh()
    return tuned


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("text", ["2:8+1:8", "e8-9+2:8"])
def test_untuned_planes_compute_what_the_planes_stand_for(codes, text):
    fit, weight = planes(text=text)
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(6.0)
    tuned = TunedPlanes(fit, bias, original=weight if codes else None)
    tuned.refresh()
    torch.testing.assert_close(tuned(x), x @ fit.dense().T + bias)
    again = tuned.representation()
    assert torch.equal(again.signs, fit.signs)
    assert torch.equal(again.scales, fit.scales)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("text", ["2:8+1:8", "e8-9+e8-8"])
def test_tuned_planes_store_what_they_computed_with_also_where_a_scale_turned(codes, text):
    fit, weight = planes(text=text)
    tuned = shaken(TunedPlanes(fit, None, original=weight if codes else None))
    assert (tuned.change < -1).any()
    stored = tuned.representation()
    assert torch.equal(stored.signs.abs(), fit.signs.abs()) is not codes
    assert torch.equal(tuned.weight, stored.dense())
    torch.testing.assert_close(tuned(torch.eye(40)).T, stored.dense(), rtol=1e-5, atol=1e-6)
    assert (stored.scales >= 0).all()
    packed = PackedLinear.of(stored)  # asserts that scales and codes have the stored format
    assert torch.equal(packed.dense(), stored.dense())


def test_the_gradient_passes_the_rounding():
    fit, weight = planes()
    tuned = shaken(TunedPlanes(fit, None, original=weight))
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    target = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    (tuned(x) - target).square().sum().backward(inputs=[tuned.weight])
    tuned.pull()
    stored = tuned.representation()
    slope = rotate(2 * (x @ stored.dense().T - target).T @ x, fit.rotation)  # of W in the planes' basis
    assert fit.rotation == 4
    for plane in range(2):
        turned = torch.where(1 + tuned.change[plane] < 0, -1.0, 1.0)
        for block, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
            signs = stored.signs[plane][:, columns] * turned[:, block, None]  # of codes, before the scale's
            expected = (slope[:, columns] * signs).sum(1) * fit.scales[plane, :, block]
            torch.testing.assert_close(tuned.change.grad[plane, :, block], expected, rtol=1e-4, atol=1e-4)
            scale = (stored.scales[plane] * turned)[:, block, None]
            latent = tuned.latents.grad[plane][:, columns]
            torch.testing.assert_close(latent, slope[:, columns] * scale, rtol=1e-4, atol=1e-4)
    assert tuned.weight.grad is None


def test_first_latents_give_the_codes_and_lean_to_the_original():
    fit, weight = planes(rows=12)
    latents = first_latents(fit, weight)
    for plane, pattern in enumerate(fit.patterns):
        assert torch.equal(codes_of(latents[plane], pattern), fit.signs[plane])
    pruned = fit.signs == 0
    left = (rotate(weight, fit.rotation) - fit.rotated())[None].expand_as(latents)
    assert torch.equal(latents[pruned].sign(), left[pruned].sign())


def test_first_latents_of_a_lattice_give_its_vectors_and_lean_to_the_original():
    fit, weight = planes(rows=12, text="e8-8")
    latents = first_latents(fit, weight)[0]
    assert torch.equal(codes_of(latents, fit.patterns[0]), fit.signs[0])
    wanted = (rotate(weight, fit.rotation) / fit.scales[0].repeat_interleave(16, 1)[:, :40]).view(-1, 8)
    groups = latents.view(-1, 8)
    before, after = (fit.signs[0].reshape(-1, 8) - wanted).norm(dim=1), (groups - wanted).norm(dim=1)
    assert (after <= before + 1e-4).all()
    assert after.mean() < 0.7 * before.mean()


def test_exactly_n_of_every_m_are_kept_also_among_ties_and_zeros():
    (pattern,) = parse_patterns("3:8")
    latents = torch.tensor([[0.0] * 8, [1.0] * 8, [-1.0, 2.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0]])
    expected = [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [-1, 1, 0, 0, -1, 0, 0, 0]]
    assert codes_of(latents, pattern).tolist() == expected


@pytest.mark.parametrize("codes", [False, True])
def test_integers_stay_integers_with_one_step_a_block(codes):
    weight, moment = layer_problem(rows=6, columns=40)
    fit = IntegerFit(3, block=16).compress(weight, moment)
    tuned = shaken(TunedPlanes(fit, None, original=weight if codes else None))
    assert (tuned.change < -1).any()
    stored = tuned.representation()
    assert torch.equal(stored.scales[1:], stored.scales[:-1] / 2)
    assert torch.equal(PackedLinear.of(stored).dense(), stored.dense())
    assert torch.equal(tuned.weight, stored.dense())


def test_the_gradient_of_a_shared_scale_is_that_of_its_integers():
    weight, moment = layer_problem(rows=6, columns=40)
    fit = IntegerFit(3, block=16).compress(weight, moment)
    tuned = TunedPlanes(fit, None)
    tuned.refresh()
    tuned.weight.grad = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    turned = rotate(tuned.weight.grad.clone(), fit.rotation)
    tuned.pull()
    products = torch.nn.functional.pad(turned * fit.rotated(), (0, 8)).view(6, 3, 16).sum(2)
    torch.testing.assert_close(tuned.change.grad, products[None], rtol=1e-4, atol=1e-5)
