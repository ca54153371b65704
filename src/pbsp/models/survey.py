"""One look at every weight of a model: whether all are finite, how large they are, and their digest."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbsp.errors import ModelError


@dataclass(frozen=True)
class Survey:
    """What the weights say.

    Attributes:
        largest: absolute value of a weight.
        digest: SHA-256 of the names and bytes of all stored tensors, whatever order they came in.
    """

    largest: float
    digest: str


def survey(tensors: Iterable[tuple[str, Tensor]]) -> Survey:
    """Look at every tensor once, as it comes.

    Raises:
        ModelError: see `check_tensor`.
    """
    largest = 0.0
    digests: dict[str, bytes] = {}
    for name, tensor in tensors:
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            check_tensor(name, tensor)
            largest = max(largest, largest_value(tensor))
        digests[name] = _digest(name, tensor)
    return Survey(largest, _joined(digests))


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise ModelError, naming the layer, if a weight is NaN or infinite."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise ModelError(
            f"{name.removesuffix('.weight')}: {bad} of {tensor.numel()} weights are NaN or infinite; "
            "the source is damaged"
        )


def largest_value(tensor: Tensor) -> float:
    """The largest absolute value."""
    return float(tensor.detach().abs().max())


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names and bytes; the order in which the tensors come does not matter."""
    return _joined({name: _digest(name, tensor) for name, tensor in tensors})


def once_each(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by its first name; one with two names comes once."""
    seen: set[int] = set()
    for name, tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _joined(digests: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
