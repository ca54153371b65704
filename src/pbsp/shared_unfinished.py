"""The unfinished folder as all processes of a run see it: the first works in it, and tells the others."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from pbsp.calibration.states import States
from pbsp.distributed import Ranks
from pbsp.errors import RankError
from pbsp.unfinished import FinishedBlock, Unfinished

T = TypeVar("T")


@dataclass(frozen=True)
class SharedUnfinished:
    """What `Unfinished` does, for processes that have the windows in parts and all else in common.

    All call each of these together. The folder has the hidden states of all windows, so that it does not
    matter how many processes go on with it.

    Attributes:
        folder: the first rank's; None elsewhere.
        ranks: the processes.
    """

    folder: Unfinished | None
    ranks: Ranks

    @staticmethod
    def of(folder: Unfinished | None, ranks: Ranks) -> "SharedUnfinished | None":
        """The first rank's folder, shared; None if it has none."""
        there = ranks.from_first(lambda: folder is not None)
        return SharedUnfinished(folder, ranks) if there else None

    def claim(self, settings: Mapping[str, str]) -> None:
        """See `Unfinished.claim`; RankError, naming what differs, if the processes have other settings."""
        found = self.ranks.gather(dict(settings))
        for rank, theirs in enumerate(found):
            for name, value in found[0].items():
                if theirs.get(name) != value:
                    raise RankError(
                        f"{name} is {value} in process 0 and {theirs.get(name)} in process {rank}; all "
                        "must have the same model, text and versions"
                    )
        self._ask(lambda folder: folder.claim(settings))

    def plan(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """See `Unfinished.plan`."""
        return self._ask(lambda folder: folder.plan())

    def keep_plan(self, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See `Unfinished.keep_plan`."""
        self._ask(lambda folder: folder.keep_plan(plan, tensors))

    def finished(self) -> int:
        """See `Unfinished.finished`."""
        return self._ask(lambda folder: folder.finished())

    def block(self, index: int) -> FinishedBlock:
        """See `Unfinished.block`."""
        return self._ask(lambda folder: folder.block(index))

    def entries(self, index: int) -> dict[str, Any]:
        """See `Unfinished.entries`."""
        return self._ask(lambda folder: folder.entries(index))

    def hidden(self, index: int) -> Iterable[Tensor]:
        """The hidden states of this rank's windows behind a finished block."""
        if self.folder and self.ranks.size == 1:
            return self.folder.hidden(index)
        return self.ranks.scatter(list(self.folder.hidden(index)) if self.folder else [])

    def keep(self, index: int, block: FinishedBlock, hidden: States, originals: States) -> None:
        """See `Unfinished.keep`; `hidden` are this rank's, `originals` of one process alone."""
        states = hidden if self.ranks.size == 1 else self.ranks.collect(list(hidden))
        if self.folder:
            self.folder.keep(index, block, states, originals)

    def _ask(self, what: Callable[[Unfinished], T]) -> T:
        """The folder's answer, on all ranks."""

        def answer() -> T:
            assert self.folder is not None, "the first rank has it"
            return what(self.folder)

        return self.ranks.from_first(answer)
