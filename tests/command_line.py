"""The command as a user calls it, in this process."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pbsp.cli import main
from tiny import CONFIGS, tiny_model, tiny_tokenizer

SAMPLES = ["--samples", "2", "--context", "16"]
SELF = ["--calibration", "self", *SAMPLES]


def save_model(folder, model=None):
    (model or tiny_model()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command; stdout is parsed where --json is asked for."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    succeeded = ended.value.code == 0
    return ended.value.code, json.loads(output) if succeeded and "--json" in arguments else output, errors


def succeeds(capsys, *arguments):
    code, output, errors = run(capsys, *arguments)
    assert errors == ""
    assert code == 0
    return output


def fails(capsys, *arguments):
    """The one line on stderr of a command that must fail, and write nothing on stdout."""
    code, output, errors = run(capsys, *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("pbsp: ")
    assert errors.count("\n") == 1
    assert errors.endswith("\n")
    return errors


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def never_loads(*arguments, **settings):
    pytest.fail("the model was loaded although the request is wrong")


def odd_model():
    """Rows of down_proj that hold no whole groups of 8."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 100
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
