"""The same seed gives the same bytes, and the caller's random states are left as they were."""

import pytest
import torch

import pbsp
from pbsp.calibration.windows import Windows
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

WINDOWS = Windows(tiny_tokens(1, 16), text="random", split="test", text_digest="0")


def compressed(threads, **settings):
    """The stored tensors and the report of a compression with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny_model()
        report = pbsp.compress(model, None, pbsp.Config(pattern="4:8", **settings), corpus=WINDOWS)
    finally:
        torch.set_num_threads(before)
    return model.state_dict(), report


PLANES = {"options": {"sweeps": 1}}
PBSP = {"method": "pbsp", "options": {"updates": 1}}


@pytest.mark.parametrize(
    "settings", [pytest.param(PLANES, id="planes"), pytest.param(PBSP, id="pbsp", marks=pytest.mark.slow)]
)
def test_one_thread_and_two_agree_to_rounding(settings):
    one, report_of_one = compressed(1, **settings)
    two, report_of_two = compressed(2, **settings)
    differing = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differing <= 1e-3 * sum(tensor.numel() for tensor in one.values())
    for left, right in zip(report_of_one.layers, report_of_two.layers, strict=True):
        assert left.output_error == pytest.approx(right.output_error, rel=1e-4)


ACTIONS = """
import random, sys
from pathlib import Path
import numpy, torch, pbsp
from pbsp.comparison.rows import parse_rows
from pbsp.comparison.run import compare
from pbsp.evaluation.perplexity import evaluate
from pbsp.generation import generate
from pbsp.models.load import load_model

source, out = sys.argv[1:]
loaded, other = load_model(source), load_model(source).model
model, tokenizer = loaded.model, loaded.tokenizer
sampled = pbsp.corpus("self", samples=1, context=8)
windows = sampled.windows(None, model)
other_text = pbsp.corpus("self", samples=1, context=8, seed=1).windows(None, model)
settings = {"calibration": windows, "texts": [other_text]}
actions = {
    "compress": lambda: pbsp.compress(other, None, pbsp.Config(pattern="4:8"), corpus=sampled),
    "evaluate": lambda: evaluate(model, windows, original=model),
    "generate": lambda: generate(model, tokenizer, "abc", max_tokens=3, temperature=1.0),
    "compare": lambda: compare(loaded, parse_rows("planes 4:8"), Path(out), **settings),
}

def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

for name, action in actions.items():
    before = states()
    action()
    print(name, states() == before)
"""


def test_random_states_of_the_caller_are_left_as_they_were(tmp_path, fresh):
    """In a process of its own: the checks of types in the tests draw random numbers themselves."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    result = fresh(ACTIONS, tmp_path / "model", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines == ["compress True", "evaluate True", "generate True", "compare True"]
