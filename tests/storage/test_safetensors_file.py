import pytest
import torch
from safetensors.torch import save_file

from pbsp.storage.bits import TensorSpec
from pbsp.storage.safetensors_file import safetensors_bytes, write_safetensors

TENSORS = {
    "model.b": torch.randn(3, 5).half(),
    "model.a": torch.randn(7).half(),
    "codes": torch.arange(11, dtype=torch.uint8),
    "scales": torch.arange(-3, 3, dtype=torch.int8).view(2, 3),
    "größe": torch.randn(2, 2),
    "brain": torch.randn(4).bfloat16(),
    "one": torch.tensor(3.0),
    "short": torch.arange(4, dtype=torch.int16),
    "none": torch.empty(0, 4),
    "long": torch.arange(3),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("count", range(1, len(TENSORS) + 1))
def test_the_file_is_the_one_that_the_library_writes(count, metadata, tmp_path):
    tensors = dict(list(TENSORS.items())[:count])
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    specs = [(name, TensorSpec(tuple(tensor.shape), tensor.dtype, "")) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "ours", specs, tensors.__getitem__, metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    if metadata:
        assert safetensors_bytes(specs, metadata) == (tmp_path / "ours").stat().st_size
