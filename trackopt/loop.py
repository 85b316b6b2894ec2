"""Where a training loop stands in its data, and how it gets back there.

A position is an epoch, a pass over a loader within it (most epochs have one) and a number of batches within the pass.
To return to it, the random number generators are put where they stood when the pass began, the loader is started, the
batches that were trained on are passed over, and the generators are put where they stood at the checkpoint. What the
loader yields next is then what it would have yielded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from trackopt.checkpoint import rng
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


class Position:
    """The position of one run.

    Attributes:
        epoch: Finished epochs.
        in_epoch: Whether the loop is inside an epoch.
        in_batch: Whether the loop is working on a batch right now.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.in_epoch = False
        self.in_batch = False
        self._pass = 0  # passes finished in this epoch
        self._batch = 0  # batches taken in the current pass
        self._start: dict[str, Any] | None = None  # the generators when the current pass began
        self._loaders: dict[int, object] = {}
        self._saved: dict[str, Any] | None = None  # a restored position that the loop has not reached yet
        self._generators: dict[int, Any] = {}  # restored states for loaders that are not known yet

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are still to come, of ``total``."""
        if self.in_epoch:
            raise UsageError("run.epochs() is running already; give each run one loop over its epochs")
        if self._saved is not None:
            rng.restore(self._saved["rng"])  # whatever the script drew while it was set up
        try:
            while self.epoch < total:
                self.in_epoch = True
                yield self.epoch
                self.epoch += 1
                self._pass, self._saved = 0, None
        finally:
            self.in_epoch = False

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of one pass over ``loader``; after a restore, those that are still to come."""
        if not self.in_epoch:
            raise UsageError("run.batches() needs `for epoch in run.epochs(n):` around it; without epochs, n is 1")
        if self.in_batch:
            raise UsageError("run.batches() stands inside another; iterate over the inner loader itself")
        self._loaders[self._pass] = loader
        try:
            for batch in self._begin(loader):
                self._batch += 1
                self.in_batch = True
                yield batch
                self.in_batch = False
        finally:
            self.in_batch = False
            self._pass, self._batch, self._start = self._pass + 1, 0, None

    def state_dict(self, *, epoch_done: bool) -> dict[str, Any]:
        """The position as plain values; ``epoch_done`` when the epoch's last line has run."""
        generators = {number: rng.capture_generators(loader) for number, loader in self._loaders.items()}
        if epoch_done:
            return {"epoch": self.epoch + 1, "pass": 0, "batch": 0, "start": None, "generators": generators}
        here = {"epoch": self.epoch, "pass": self._pass, "batch": self._batch, "start": self._start}
        return {**here, "generators": generators}

    def load_state_dict(self, state: dict[str, Any], global_rng: dict[str, Any]) -> None:
        """Aim at a saved position, which ``epochs`` and ``batches`` lead to; ``global_rng`` is as it was there."""
        self.epoch = state["epoch"]
        self._saved = {**state, "rng": global_rng}
        self._generators = dict(state["generators"])

    def _begin(self, loader: Iterable[T]) -> Iterator[T]:
        saved, generators = self._saved, self._generators.pop(self._pass, [])
        if saved is not None and self._pass == saved["pass"] and saved["start"] is not None:
            self._saved = None
            self._start, self._batch = saved["start"], saved["batch"]
            rng.restore(saved["start"]["rng"])
            rng.restore_generators(loader, saved["start"]["generators"])
            iterator = iter(loader)
            _skip(iterator, loader, saved["batch"])
            rng.restore(saved["rng"])
            rng.restore_generators(loader, generators)
            return iterator
        rng.restore_generators(loader, generators)
        if saved is not None and self._pass < saved["pass"]:
            return iter(())
        self._saved = None
        self._start = {"rng": rng.capture(), "generators": rng.capture_generators(loader)}
        return iter(loader)


def _skip(iterator: Iterator[object], loader: object, count: int) -> None:
    """Pass over ``count`` batches.

    A loader without workers loads its samples with the global generators, which are set afterwards, so it is enough
    to draw the indices. With workers, whose generators cannot be reached, and for any other iterable the batches
    themselves must be drawn.
    """
    if (
        isinstance(loader, DataLoader)
        and loader.num_workers == 0
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(iterator, "_next_index")
    ):
        for _ in range(count):
            iterator._next_index()
    else:
        for _ in range(count):
            next(iterator, None)
