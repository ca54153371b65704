"""What the numbers of a comparison depend on besides the rows, by name, to be compared and shown."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pbsp.calibration.windows import Windows
from pbsp.compress import versions
from pbsp.models.load import LoadedModel


def settings_of(loaded: LoadedModel, calibration: Windows, texts: Sequence[Windows]) -> dict[str, str]:
    """Name → value; a name that ends in "digest" says the same as others, but surely."""
    return {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "calibration text": calibration.text,
        "calibration windows": str(len(calibration)),
        "calibration context": str(calibration.context),
        "calibration seed": str(calibration.seed),
        "texts": ", ".join(text.text for text in texts),
        "text windows": ", ".join(str(len(text)) for text in texts),
        "text context": ", ".join(dict.fromkeys(str(text.context) for text in texts)),
        **{f"version of {name}": version for name, version in versions().items()},
        "model digest": weights_digest(loaded.model)[:16],
        "calibration digest": calibration.digest[:16],
        "texts digest": ", ".join(text.digest[:16] for text in texts),
    }


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` writes, by its first name; a tensor with two names comes once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the names and bytes of all stored tensors."""
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
