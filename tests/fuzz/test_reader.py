"""Damaged and hostile files and settings: nothing but a PbspError comes out of the reader, and soon.

The normal run tries a few hundred inputs of each kind; `test_many_inputs`, marked slow, tries 100,000 in all.
"""

import json
import subprocess
import sys

import pytest

import fuzzing
from fuzzing import TARGETS, attack

FEW = {"load": 20, "inspect": 20}
SHARE = {
    "settings": 30_000, "packed": 25_000, "quantization_config": 27_000, "safetensors": 15_000, "load": 2_000,
    "inspect": 1_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_hundred_inputs_give_named_errors_or_a_result(targets, name):
    found = attack(targets[name], examples=FEW.get(name, 200), seed=0)
    assert found.inputs >= FEW.get(name, 200)
    assert 0 < found.refused < found.inputs  # some of the inputs are harmless


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARE)
def test_many_inputs(name):
    command = [sys.executable, fuzzing.__file__, "1", f"{name}={SHARE[name]}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr[-5000:]
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert sum(turn["inputs"] for turn in turns) >= SHARE[name]
    assert max(turn["slowest_seconds"] for turn in turns) < 30
    assert sum(turn["grown_bytes"] for turn in turns) < 500e6
