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
from pbsp.recovery.block import BlockTask, adapt_block, recover_block
from pbsp.recovery.tunable import Tuning
from pbsp.unfinished import Unfinished
from tiny import tiny_model, tiny_tokens


def first_block(name):
    """A model's first block, and what it shall do."""
    model = tiny_model(name)
    block = decoder_blocks(model)[0]
    walk = Walk(model, decoder_blocks(model), tiny_tokens(10, 24))
    targets = [walk.replay(0, block.module, hidden) for hidden in walk.hidden]
    return model, block, BlockTask(partial(walk.replay, 0, block.module), walk.hidden, targets)


def compressed_block(name="qwen2"):
    """The same, compressed, and the weights that it had."""
    model, block, task = first_block(name)
    originals = {}
    for layer, module in block.linears().items():
        weight = linear_weight(module).float()
        originals[layer.removeprefix(f"{block.name}.")] = weight
        fit = PlaneFit(parse_patterns("1:8"), sweeps=1).compress(weight, torch.eye(weight.shape[1]))
        replace_module(model, layer, PackedLinear.of(fit, module.bias))
    return block.module, task, originals


def forms(module):
    return {name: m.packed.form for name, m in module.named_modules() if isinstance(m, PackedLinear)}


def test_the_loss_is_relative_to_each_tokens_length():
    targets = [torch.tensor([[[1.0, 0.0], [0.0, 100.0]]])] * 9
    task = BlockTask(lambda hidden: hidden + torch.tensor([0.5, 0.0]), targets, targets)
    assert task.held_out() == pytest.approx((0.25 + 0.25 / 100**2) / 2)
    assert task.train == range(8)


def test_products_in_bfloat16_hardly_change_the_loss(matrix_instructions):
    _, task, _ = compressed_block()
    exact = task.held_out()
    matrix_instructions(True)
    assert task.held_out() != exact
    assert task.held_out() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("code_rate", [0.0, 1e-2])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@torch.no_grad()
def test_recovery_lowers_the_error_and_keeps_the_bits(name, code_rate):
    block, task, originals = compressed_block(name)
    sizes = forms(block)
    tuning = Tuning(epochs=6, rate=2e-2, code_rate=code_rate)
    first = task.held_out()
    before, after, steps = recover_block(block, task, originals=originals, tuning=tuning)
    assert before == pytest.approx(first, rel=1e-4)
    assert after == pytest.approx(task.held_out(), rel=1e-4)
    assert after < 0.9 * before
    assert steps == 6 * 9
    assert forms(block) == sizes
    assert not any(parameter.grad is not None for parameter in block.parameters())


@torch.no_grad()
def test_codes_change_where_they_are_tuned_and_nowhere_else():
    changed = {}
    for rate in (0.0, 3e-2):
        block, task, originals = compressed_block()
        before = {name: m.packed.unpack().keep for name, m in block.named_modules() if name in forms(block)}
        recover_block(block, task, originals=originals, tuning=Tuning(2, 2e-2, rate))
        after = {name: block.get_submodule(name).packed.unpack().keep for name in before}
        changed[rate] = any(not torch.equal(after[name], before[name]) for name in before)
    assert changed == {0.0: False, 3e-2: True}


@torch.no_grad()
def test_recovery_never_ends_worse():
    block, task, originals = compressed_block()
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    before, after, _ = recover_block(block, task, originals=originals, tuning=Tuning(1, 100.0, 100.0))
    assert after == before
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@torch.no_grad()
def test_an_uncompressed_block_is_adapted_to_other_inputs():
    _, block, task = first_block("qwen2")
    block.module.input_layernorm.weight.mul_(3)  # which the projections behind it can make up for
    weights = {name: module.weight for name, module in block.linears().items()}
    wanted = {name: weight.requires_grad for name, weight in weights.items()}
    before, after = adapt_block(weights, task, Tuning(4, 1e-2, 0.0))
    assert after == pytest.approx(task.held_out(), rel=1e-4)
    assert after < 0.9 * before
    assert {name: weight.requires_grad for name, weight in weights.items()} == wanted
    unchanged = {name: weight.clone() for name, weight in weights.items()}
    assert adapt_block(weights, task, Tuning(1, 100.0, 0.0)) == (pytest.approx(after), pytest.approx(after))
    assert all(torch.equal(weights[name], unchanged[name]) for name in weights)


def windows(count):
    return Windows(tiny_tokens(count, 32), text="random", split="test", text_digest="0")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_recovered_model_saves_resumes_and_is_as_large(name, tmp_path):
    folders, corpus = {}, windows(48 if name == "gpt2" else 16)
    for recover in ("none", "block"):
        model = tiny_model(name)
        report = pbsp.compress(model, None, Config(pattern="2:8", recover=recover), corpus=corpus)
        pbsp.save_compressed(model, None, tmp_path / recover, report)
        folders[recover] = (tmp_path / recover / "model.safetensors").read_bytes()
    assert len(folders["none"]) == len(folders["block"])
    assert len(report.recovered) == 2
    assert all(one.after <= one.before for one in report.recovered)
    assert name != "gpt2" or any(one.after < one.before for one in report.recovered)  # of 48 windows

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
            corpus=corpus,
            progress=progress,
            unfinished=Unfinished(tmp_path / "kept"),
        )
    model = tiny_model(name)
    again = pbsp.compress(model, None, config, corpus=corpus, unfinished=Unfinished(tmp_path / "kept"))
    pbsp.save_compressed(model, None, tmp_path / "resumed", again)
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == folders["block"]
    assert again.recovered == report.recovered


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(ConfigError, match="recover takes method planes"):
        Config(method="pbsp", recover="block")
    with pytest.raises(ConfigError, match="recover takes"):
        Config(inputs="original", recover="block")
