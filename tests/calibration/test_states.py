import errno

import pytest
import torch

from pbsp.calibration.states import FiledStates, copied, no_states
from pbsp.errors import OutputError
from pbsp.models.load import load_model
from tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_gives_back_what_was_put_in(dtype, tmp_path):
    given = [torch.randn(1, 5, 3).to(dtype) for _ in range(4)]
    states = FiledStates(str(tmp_path), CPU)
    for state in given:
        states.append(state)
    given[2] = torch.randn(5, 3, 1).to(dtype).permute(2, 0, 1)
    states[2] = given[2]
    assert len(states) == 4
    assert all(map(torch.equal, states, given))
    states[0].zero_()
    assert torch.equal(states[0], given[0])
    with pytest.raises(IndexError):
        states[4]


def test_the_file_has_no_name_so_nothing_can_be_left(tmp_path):
    states = FiledStates(str(tmp_path), CPU)
    states.append(torch.ones(1, 2, 2))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_output_error(tmp_path, monkeypatch):
    class Full:
        def seek(self, place):
            return place

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    states = FiledStates(str(tmp_path), CPU)
    states._file = Full()
    with pytest.raises(OutputError, match=r"hidden states do not fit in .*: No space left"):
        states.append(torch.ones(1, 2, 2))


def test_states_stay_in_memory_with_their_model(tmp_path):
    model = tiny_model()
    assert no_states(model) == []
    model.save_pretrained(tmp_path / "model")
    in_blocks = load_model(str(tmp_path / "model"), memory="blocks").model
    assert isinstance(no_states(in_blocks), FiledStates)


def test_a_copy_is_changed_apart():
    states = [torch.ones(1, 2, 2)]
    copies = copied(tiny_model(), states)
    copies[0] = torch.zeros(1, 2, 2)
    assert states[0].sum() == 4
