from functools import partial

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
from pbsp.recovery.block import recover_block
from pbsp.recovery.tunable import Tuning
from pbsp.unfinished import Unfinished
from tiny import tiny_model, tiny_tokens


def compressed_block(pattern="1:8", name="qwen2"):
    model = tiny_model(name)
    block = decoder_blocks(model)[0]
    walk = Walk(model, decoder_blocks(model), tiny_tokens(10, 24))
    targets = [walk.replay(0, block.module, hidden) for hidden in walk.hidden]
    originals = {}
    for name, module in block.linears().items():
        weight = linear_weight(module).float()
        originals[name.removeprefix(f"{block.name}.")] = weight
        fit = PlaneFit(parse_patterns(pattern), sweeps=1).compress(weight, torch.eye(weight.shape[1]))
        replace_module(model, name, PackedLinear.of(fit, module.bias))
    run = partial(walk.replay, 0, block.module)
    return partial(recover_block, block.name, block.module, run, walk.hidden, targets, originals=originals)


def error(run, inputs, targets):
    pairs = [(run(hidden), target) for hidden, target in zip(inputs, targets, strict=True)]
    return sum(float(((a - b).square().sum(-1) / b.square().sum(-1)).mean()) for a, b in pairs) / len(pairs)


def forms(module):
    return {name: m.packed.form for name, m in module.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("code_rate", [0.0, 1e-2])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@torch.no_grad()
def test_recovery_lowers_the_error_and_keeps_the_bits(name, code_rate):
    recover = compressed_block(name=name)
    _, block, run, inputs, targets = recover.args
    sizes, before = forms(block), error(run, inputs[-1:], targets[-1:])
    found = recover(tuning=Tuning(epochs=6, rate=2e-2, code_rate=code_rate))
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(error(run, inputs[-1:], targets[-1:]), rel=1e-4)
    assert found.after < 0.9 * found.before
    assert found.steps == 6 * 9
    assert forms(block) == sizes
    assert not any(parameter.grad is not None for parameter in block.parameters())


@torch.no_grad()
def test_codes_change_where_they_are_tuned_and_nowhere_else():
    changed = {}
    for rate in (0.0, 3e-2):
        recover = compressed_block()
        block = recover.args[1]
        before = {name: m.packed.unpack().keep for name, m in block.named_modules() if name in forms(block)}
        recover(tuning=Tuning(epochs=2, rate=2e-2, code_rate=rate))
        after = {name: block.get_submodule(name).packed.unpack().keep for name in before}
        changed[rate] = any(not torch.equal(after[name], before[name]) for name in before)
    assert changed == {0.0: False, 3e-2: True}


@torch.no_grad()
def test_recovery_never_ends_worse():
    recover = compressed_block()
    block = recover.args[1]
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    found = recover(tuning=Tuning(epochs=1, rate=100.0, code_rate=100.0))
    assert found.after == found.before
    for name, tensor in block.state_dict().items():
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
    assert name == "llama" or all(one.after < one.before for one in report.recovered)

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
