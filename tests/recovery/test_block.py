import pytest
import torch

import pbsp
from pbsp.calibration.walk import Walk
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.errors import ConfigError
from pbsp.integrations.modules import replace_module
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import parse_patterns
from pbsp.recovery.block import Tuning, recover_block
from pbsp.recovery.tuned_planes import TunedPlanes
from pbsp.unfinished import Unfinished
from tiny import tiny_model, tiny_tokens
from variants import layer_problem


def planes(rows=6, columns=40, block=16):
    weight, moment = layer_problem(rows=rows, columns=columns)
    return PlaneFit(parse_patterns("2:8+1:8"), block=block, sweeps=1).compress(weight, moment)


def test_untuned_planes_compute_what_the_planes_stand_for():
    fit = planes()
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(6.0)
    torch.testing.assert_close(TunedPlanes(fit, bias)(x), x @ fit.dense().T + bias)
    again = TunedPlanes(fit, bias).planes()
    assert torch.equal(again.signs, fit.signs)
    assert torch.equal(again.scales, fit.scales)


def test_tuned_planes_store_what_they_computed_with_also_where_a_scale_turned():
    fit = planes()
    tuned = TunedPlanes(fit, None)
    with torch.no_grad():
        tuned.change.copy_(torch.randn(tuned.change.shape, generator=torch.Generator().manual_seed(0)))
    assert (tuned.change < -1).any()
    stored = tuned.planes()
    x = torch.eye(40)
    torch.testing.assert_close(tuned(x).T, stored.dense(), rtol=1e-5, atol=1e-6)
    assert (stored.scales >= 0).all()
    packed = PackedLinear.of(stored)  # asserts that the scales have the stored format
    assert torch.equal(packed.dense(), stored.dense())


def test_the_gradient_passes_the_rounding():
    fit = planes()
    tuned = TunedPlanes(fit, None)
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    target = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((tuned(x) - target).square().sum(), tuned.change)
    slope = 2 * (x @ fit.dense().T - target).T @ x  # of W
    for plane in range(2):
        for block, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
            expected = (slope * fit.signs[plane])[:, columns].sum(1) * fit.scales[plane, :, block]
            torch.testing.assert_close(found[plane, :, block], expected, rtol=1e-4, atol=1e-4)


def compressed_block(pattern="1:8"):
    model = tiny_model("qwen2")
    block = decoder_blocks(model)[0]
    walk = Walk(model, decoder_blocks(model), tiny_tokens(10, 24))
    targets = [walk.replay(0, block.module, hidden) for hidden in walk.hidden]
    for name, module in block.linears().items():
        weight = linear_weight(module).float()
        fit = PlaneFit(parse_patterns(pattern), sweeps=1).compress(weight, torch.eye(weight.shape[1]))
        replace_module(model, name, PackedLinear.of(fit, module.bias))
    return block, (lambda hidden: walk.replay(0, block.module, hidden)), walk.hidden, targets


def error(run, inputs, targets):
    pairs = [(run(hidden), target) for hidden, target in zip(inputs, targets, strict=True)]
    return sum(float(((a - b).square().sum(-1) / b.square().sum(-1)).mean()) for a, b in pairs) / len(pairs)


@torch.no_grad()
def test_recovery_lowers_the_error_and_keeps_the_bits():
    block, run, inputs, targets = compressed_block()
    sizes = {name: m.packed.form for name, m in block.module.named_modules() if isinstance(m, PackedLinear)}
    before = error(run, inputs[-1:], targets[-1:])
    found = recover_block(block.name, block.module, run, inputs, targets, Tuning(epochs=6, rate=2e-2))
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(error(run, inputs[-1:], targets[-1:]), rel=1e-4)
    assert found.after < 0.9 * found.before
    assert found.steps == 6 * 9
    after = {name: m.packed.form for name, m in block.module.named_modules() if isinstance(m, PackedLinear)}
    assert after == sizes
    assert not any(parameter.grad is not None for parameter in block.module.parameters())


@torch.no_grad()
def test_recovery_never_ends_worse():
    block, run, inputs, targets = compressed_block()
    state = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    found = recover_block(block.name, block.module, run, inputs, targets, Tuning(epochs=1, rate=100.0))
    assert found.after == found.before
    for name, tensor in block.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def windows():
    return Windows(tiny_tokens(48, 32), text="random", split="test", text_digest="0")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_recovered_model_saves_resumes_and_is_as_large(name, tmp_path):
    folders = {}
    for recover in ("none", "block"):
        model = tiny_model(name)
        report = pbsp.compress(model, None, Config(pattern="2:8", recover=recover), corpus=windows())
        pbsp.save_compressed(model, None, tmp_path / recover, report)
        folders[recover] = (tmp_path / recover / "model.safetensors").read_bytes()
    assert len(folders["none"]) == len(folders["block"])
    assert len(report.recovered) == 2
    assert all(one.after <= one.before for one in report.recovered)
    assert name != "llama" or any(one.after < one.before for one in report.recovered)

    class Stopped(Exception):  # noqa: N818
        pass

    def progress(stage, done, total):
        if stage == "compress" and done == 1:
            raise Stopped

    config = Config(pattern="2:8", recover="block")
    with pytest.raises(Stopped):
        pbsp.compress(
            tiny_model(name),
            None,
            config,
            corpus=windows(),
            progress=progress,
            unfinished=Unfinished(tmp_path / "kept"),
        )
    model = tiny_model(name)
    again = pbsp.compress(model, None, config, corpus=windows(), unfinished=Unfinished(tmp_path / "kept"))
    pbsp.save_compressed(model, None, tmp_path / "resumed", again)
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == folders["block"]
    assert again.recovered == report.recovered


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(ConfigError, match="recover takes method planes"):
        Config(method="pbsp", recover="block")
    with pytest.raises(ConfigError, match="recover takes"):
        Config(inputs="original", recover="block")
