"""Several processes that compress one model together: who does what, and how they exchange it.

Each holds the whole model, a part of the calibration windows, and solves a part of a block's linears. Code
that takes a `Ranks` is written once, for any number of processes: of one alone every verb is a no-op. All
processes must call the verbs in the same order; what they decide must follow from what all know.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pbsp.errors import ConfigError, RankError
from pbsp.torchrun import place

_TIMEOUT = timedelta(hours=6)
"""A process that dies is noticed at once, by its closed connections; this is for a machine that vanishes. It
must be longer than any wait for work that one process does alone, as sampling text."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; the default is one alone.

    Attributes:
        rank: 0 to size − 1; the first alone talks to the user and writes files.
        size: how many there are.
        device: where others' tensors are put that are not on the CPU.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """This rank's of `count` things in order: the parts follow each other, and differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def add(self, tensor: Tensor) -> Tensor:
        """Replace the tensor's values by the sum over all ranks, equal on all to the bit; returns it."""
        if self.size > 1:
            with _reaching_others():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        written = _written(value)
        with _reaching_others():
            dist.all_gather_object(found, written)
        return [value if rank == self.rank else _read(one, self.device) for rank, one in enumerate(found)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank; the others do not call it."""
        value = make() if self.first else None
        if self.size == 1:
            return value  # pyright: ignore[reportReturnType] - it is the first
        found = [_written(value)]
        with _reaching_others():
            dist.broadcast_object_list(found, src=0)
        return value if self.first else _read(found[0], self.device)  # pyright: ignore[reportReturnType]

    def after_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on each rank; the others call it when the first has, to find its downloads."""
        value = make() if self.first else None
        self.gather(None)
        return value if self.first else make()  # pyright: ignore[reportReturnType]

    def deal(self, costs: Sequence[int]) -> list[int]:
        """The rank that each of some tasks falls to: the costliest first, to who has least so far."""
        loads, owners = [0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = loads.index(min(loads))
            loads[owners[task]] += costs[task]
        return owners

    def spread(self, costs: Sequence[int], work: Callable[[int], T]) -> list[T]:
        """What `work` makes of each task, 0 to len(costs) − 1; each is done by one rank, and told to all."""
        owners = self.deal(costs)
        done = self.gather({task: work(task) for task, owner in enumerate(owners) if owner == self.rank})
        return [done[owner][task] for task, owner in enumerate(owners)]

    def collect(self, tensors: list[Tensor]) -> list[Tensor]:
        """All ranks' tensors, of one shape, in the order of the ranks, on the first; nothing elsewhere.

        One at a time, as they are: hidden states of all windows can be gigabytes.
        """
        found = list(tensors) if self.first else []
        for source, count in enumerate(self.gather(len(tensors))[1:], 1):
            for index in range(count):
                if self.first:
                    found.append(torch.empty_like(tensors[0], device="cpu"))
                    _receive(found[-1], source)
                elif self.rank == source:
                    _send(tensors[index], 0)
        return found

    def scatter(self, tensors: list[Tensor]) -> list[Tensor]:
        """The inverse of `collect`: this rank's part of the tensors that the first has."""
        if self.size == 1:
            return tensors
        shape, dtype, count = self.from_first(lambda: (tensors[0].shape, tensors[0].dtype, len(tensors)))
        if not self.first:
            found = [torch.empty(shape, dtype=dtype) for _ in self.part(count)]
            for tensor in found:
                _receive(tensor, 0)
            return found
        for target in range(1, self.size):
            for index in Ranks(target, self.size).part(count):
                _send(tensors[index], target)
        return [tensors[index] for index in self.part(count)]


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun has started, connected; of a process started otherwise, itself.

    An error that ends the context leaves the connections open: the others are to hear from torchrun, or from
    who tells the user, not before.

    Args:
        device: from `device_of_rank`.

    Raises:
        RankError: the others cannot be reached.
    """
    here = place()
    if here.size == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    with _reaching_others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    yield Ranks(here.rank, here.size, device)
    dist.destroy_process_group()


def device_of_rank(requested: str) -> str:
    """What `load_model` takes as device: among several processes each takes its own GPU, if there is one.

    Raises:
        ConfigError: all are to use one GPU.
    """
    here = place()
    if here.size == 1:
        return requested
    if requested.startswith("cuda:"):
        raise ConfigError(f"{here.size} processes cannot share {requested}; choose auto, cuda or cpu")
    wanted = requested == "cuda" or (requested == "auto" and torch.cuda.is_available())
    return f"cuda:{here.local_rank}" if wanted else requested.replace("auto", "cpu")


@contextmanager
def _reaching_others() -> Iterator[None]:
    """What fails between processes, as one line. Nothing but a call of torch.distributed belongs inside."""
    try:
        yield
    except RuntimeError as error:  # gloo raises just this; torch's own DistError is one
        reason = str(error).split("] ", 1)[-1].split(". ")[0]
        raise RankError(
            f"another process of this run has ended or cannot be reached ({reason}); torchrun's own "
            "output says which; what was finished is kept, go on with --resume"
        ) from error


def _written(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _read(written: bytes, device: str) -> Any:
    def own(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.cuda(torch.device(device).index)

    return torch.load(io.BytesIO(written), map_location=own, weights_only=False)


def _send(tensor: Tensor, target: int) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    with _reaching_others():
        dist.send(flat, target)


def _receive(tensor: Tensor, source: int) -> None:
    with _reaching_others():
        dist.recv(tensor.reshape(-1).view(torch.uint8), source)
