import pytest
import torch

from pbsp.errors import ConfigError
from pbsp.models import memory
from pbsp.models.memory import check_memory, free_bytes, in_blocks, whole_bytes
from tiny import tiny_model

CPU = torch.device("cpu")


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_weights_and_hidden_states_are_counted_from_the_files_headers(tmp_path):
    model = tiny_model("llama-untied")
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert whole_bytes(tmp_path, 4, tokens=0) == 4 * numbers(model)
    assert whole_bytes(tmp_path, 4, tokens=1000) == 4 * (numbers(model) + 1000 * 64)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_other_names_of_the_width_are_known(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    assert whole_bytes(tmp_path, 2, tokens=7) - whole_bytes(tmp_path, 2, tokens=0) == 2 * 7 * 64


def test_auto_asks_whether_the_model_fits_in_the_memory_that_is_free(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    needed = 4 * (numbers(model) + 100 * 64)
    for free, expected in ((needed / 0.69, False), (needed / 0.71, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free))
        assert in_blocks("auto", tmp_path, device=CPU, itemsize=4, tokens=100) is expected
        assert in_blocks("blocks", tmp_path, device=CPU, itemsize=4, tokens=100)
        assert not in_blocks("whole", tmp_path, device=CPU, itemsize=4, tokens=100)


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    unlimited = free_bytes(CPU)
    assert unlimited is None or unlimited > 0
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\nfile 1500000\n")
    assert unlimited is None or free_bytes(CPU) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert unlimited is None or free_bytes(CPU) > 3_000_000


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="memory 'disk' is unknown; choose auto, whole, blocks"):
        check_memory("disk")
