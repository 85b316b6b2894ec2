"""The position of a training loop in its data, and how a resumed loop returns to it.

A position is an epoch, a pass over a loader within it (most epochs have one) and a number of batches within the pass.
To return to it, the script runs the epoch's first lines again, with the states that the random number generators had
then. The loader is started with their states from the beginning of the pass, and the batches that were trained on are
skipped. Finally everything is restored as it was at the checkpoint. The loader then yields what it would have yielded
without the interruption.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from torch.utils.data import IterableDataset
from torch.utils.data.distributed import DistributedSampler

from trackopt.errors import UsageError
from trackopt.run import loader_state
from trackopt.run.draw_state import DrawState
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from trackopt.utils.types import StateDict

T = TypeVar("T")


class DataPosition:
    """The position of one run.

    Args:
        stateful: The objects that the run saves besides model, optimizer and scheduler. Generators among them are
            restored like the global ones; a loader among them (torchdata's ``StatefulDataLoader``) returns to its
            position by itself.

    Attributes:
        epoch: Finished epochs.
        in_epoch: True while the loop is inside an epoch.
        in_pass: True while it is inside a pass over a loader.
        in_batch: True while it works on a batch.
        is_unfinished: True after the loop was left in the middle of an iteration, until it continues.
        batch: Batches taken in the current pass.
    """

    def __init__(self, stateful: Mapping[str, Any]) -> None:
        self.epoch = 0
        self.in_epoch = self.in_pass = self.in_batch = False
        self.is_unfinished = False
        self._generators = {name: value for name, value in stateful.items() if rng.is_generator(value)}
        self._stateful_loaders = [value for value in stateful.values() if not rng.is_generator(value)]
        self._pass = 0  # finished passes of this epoch
        self.batch = 0
        self._carries_passes = False  # a pass that is open at the end of an epoch continues in the next one
        self._has_one_loader = False  # all passes of the restored epoch went over one loader
        self._epoch_start: StateDict | None = None  # the generators when the epoch began
        self._pass_start: StateDict | None = None  # the generators, and the loader's, when the pass began
        self._length: int | None = None  # batches of the pass
        self._size = loader_state.LoaderSize()  # of the loader of the pass
        self._samples_before = 0  # samples that were taken in the pass, beyond its whole batches
        self._draws = DrawState(())
        self._loaders: dict[int, object] = {}
        self._saved: StateDict | None = None  # a restored position that the loop has not reached yet
        self._loader_states: dict[int, Any] = {}  # restored states of loaders that are not known yet
        self._on_restored: Callable[[], None] = lambda: None
        self._world_size_changed = False  # the ranks shared the data differently when it was saved
        # by shuffling sampler: the epoch of the run and that of the sampler when it was first seen
        self._sampler_epochs: WeakKeyDictionary[object, tuple[int, int]] = WeakKeyDictionary()

    @property
    def is_between_epochs(self) -> bool:
        """True before and after the loop over epochs, when a resume repeats nothing of an epoch."""
        return not self.in_epoch and not self.is_fast_forwarding

    @property
    def has_passes(self) -> bool:
        """True once a pass of this epoch is over."""
        return self._pass > 0

    @property
    def is_fast_forwarding(self) -> bool:
        """True until the loop reaches the position within an epoch at which the checkpoint was taken."""
        saved = self._saved
        return saved is not None and (saved["epoch_start"] is not None or saved["pass_start"] is not None)

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the remaining epochs, of ``total``."""
        if self.in_epoch:
            raise UsageError("run.epochs() is running already; give each run one loop over its epochs")
        if self._saved is not None:  # undo what the script's set-up drew
            self._restore_rng(self._saved["epoch_start"] or self._saved["here"])
        try:
            while self.epoch < total:
                self.in_epoch, self.is_unfinished = True, False
                self._epoch_start = self._capture()
                yield self.epoch
                self.finish_epoch()
        finally:
            self.in_epoch = False

    def finish_epoch(self) -> None:
        """Go on to the next epoch: the last line of this one has run."""
        self.epoch += 1
        self._pass, self._saved = 0, None

    def sampler_epoch_is_stale(self, loader: object) -> bool:
        """Return True if the loader's sampler repeats the order of an earlier epoch, as no one called ``set_epoch``."""
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler) or not sampler.shuffle:
            return False
        first, sampler_epoch = self._sampler_epochs.setdefault(sampler, (self.epoch, sampler.epoch))
        return self.epoch > first and sampler.epoch == sampler_epoch

    def batches(self, loader: Iterable[T], *, by_next: bool = False, is_carried: bool = False) -> Iterator[T]:
        """Yield the batches of one pass over ``loader``; after a restore, the remaining ones.

        Args:
            loader: The loader.
            by_next: The batches are asked for by ``next``, so that the script itself begins the next pass. Then the
                passes that were over at the checkpoint are not repeated.
            is_carried: The iterator was made outside of the epoch, or a generator of the script's holds it. Then a
                pass that is open at the end of an epoch continues in the next one.
        """
        if not self.in_epoch:
            raise UsageError("run.batches() needs `for epoch in run.epochs(n):` around it; without epochs, n is 1")
        if self.in_pass:
            raise UsageError("run.batches() stands inside another; iterate over the inner loader itself")
        saved, self._carries_passes = self._saved, self._carries_passes or is_carried
        if saved is not None and by_next and self._has_one_loader:
            self._pass = saved["pass"]
        self._loaders[self._pass] = loader
        self._length, self._size = length(loader), loader_state.LoaderSize.of(loader)
        self.in_pass, self.is_unfinished = True, False
        try:
            batches = self._begin(loader)
            self._draws = DrawState([*self._generators.values(), *rng.find_generators(loader)])
            for batch in self._draws.watch(batches):
                self.batch += 1
                self.in_batch = True
                yield batch
                self.in_batch = False
        finally:
            self.in_pass = self.in_batch = False
            self._pass, self.batch, self._pass_start = self._pass + 1, 0, None
            self._samples_before = 0

    @contextmanager
    def before_batch(self) -> Iterator[None]:
        """Go back to the point before the current batch was drawn, within the ``with`` block."""
        self.batch -= 1
        with self._draws.rewound():
            yield
        self.batch += 1

    def state_dict(self, *, epoch_done: bool) -> StateDict:
        """Return the position as plain values; ``epoch_done`` means that the epoch's last line has run."""
        distinct = {id(loader): loader for loader in self._loaders.values()}
        has_one = len(distinct) == 1 and not self._loader_states
        loaders = dict(enumerate(distinct.values())) if has_one else self._loaders
        own = {number: self._own_state(loader) for number, loader in loaders.items()}
        state: StateDict = {
            "epoch": self.epoch + epoch_done,
            "pass": self._pass,
            "batch": self.batch,
            "epoch_start": self._epoch_start,
            "pass_start": self._pass_start,
            "length": self._length,
            **self._size.as_dict(self.batch, self._samples_before),
            "one_loader": has_one,
            "carries": self._carries_passes,
            "own": self._loader_states | own,  # some loaders have not been used since the resume
        }
        if epoch_done or self.is_between_epochs:  # the next epoch's first lines have not run
            state |= {"pass": 0, "epoch_start": None}
            if not (self.in_pass and self._carries_passes):
                state |= {"batch": 0, "pass_start": None}
        return state

    def pass_start(self) -> tuple[StateDict, StateDict]:
        """Return the position, and the global generators, at the beginning of the current pass."""
        assert self._pass_start is not None  # noqa: S101 - for mypy: a pass has begun
        state = self.state_dict(epoch_done=False)
        key = 0 if state["one_loader"] else self._pass
        own = {**state["own"], key: self._pass_start["own"]}
        return {**state, "batch": 0, "samples": 0, "pass_start": None, "own": own}, self._pass_start["rng"]

    def load_state_dict(
        self, state: StateDict, on_restored: Callable[[], None], *, world_size_changed: bool = False
    ) -> None:
        """Set a saved position as the one that ``epochs`` and ``batches`` return to.

        Args:
            state: The result of ``state_dict``. The generators have been restored to that checkpoint already.
            on_restored: Called in the middle of the epoch, before the first batch is drawn. It undoes what the
                epoch's first lines did a second time.
            world_size_changed: Another number of processes shares the data now. Then the same fraction of the
                loader's batches is skipped, rather than the same number.
        """
        self.epoch, self._world_size_changed = state["epoch"], world_size_changed
        self._saved = {**state, "here": self._capture()}
        self._loader_states = dict(state["own"])
        self._has_one_loader = state.get("one_loader", False)
        self._carries_passes = state.get("carries", False)
        self._on_restored = on_restored

    def _begin(self, loader: Iterable[T]) -> Iterator[T]:
        saved, key = self._saved, 0 if self._has_one_loader else self._pass
        own = self._loader_states.get(key, loader_state.NO_STATE)
        is_over = saved is not None and self._pass < saved["pass"]
        if not (is_over and self._has_one_loader):
            self._loader_states.pop(key, None)
        if is_over:
            loader_state.start_workers(loader, own)
            loader_state.restore_loader(loader, own)
            return iter(())
        is_stateful = any(loader is stateful for stateful in self._stateful_loaders)
        if is_stateful:  # before its state is restored
            loader_state.start_workers(loader, own)
        self._saved = None
        if saved is not None and saved["epoch_start"] is not None:
            self._on_restored()
            self._restore_rng(saved["here"])
        if saved is None or saved["pass_start"] is None:
            if not is_stateful:
                loader_state.start_workers(loader, own)
            if own is not loader_state.NO_STATE:
                loader_state.warn_if_inexact(loader, own, own)
            loader_state.restore_loader(loader, own)
            self._pass_start = {**self._capture(), "own": loader_state.loader_state(loader)}
            return loader_state.begin_pass(loader)
        here = self._capture()  # an epoch's first lines may have drawn
        iterator = self._resume(loader, saved, own, is_stateful=is_stateful)
        self._restore_rng(here)
        rng.restore_all(rng.find_generators(loader), own["generators"])
        return iterator

    def _resume(
        self, loader: Iterable[T], saved: Mapping[str, Any], own: StateDict, *, is_stateful: bool
    ) -> Iterator[T]:
        """Return to the middle of a pass: begin it as it was begun, without the batches that were taken."""
        self._pass_start, self.batch = saved["pass_start"], self._find_batch(saved)
        at_start = self._pass_start["own"]
        loader_state.warn_if_inexact(loader, own, at_start)
        if not is_stateful:
            is_drawn = isinstance(getattr(loader, "dataset", None), IterableDataset)
            loader_state.start_workers(loader, at_start if is_drawn else {**own, "warm": at_start["warm"]})
        self._restore_rng(self._pass_start)
        loader_state.restore_loader(loader, at_start)
        if is_stateful:  # it returns to its position by itself
            return iter(loader)
        return loader_state.resume_pass(loader, own, self.batch, self._samples_before)

    def _own_state(self, loader: object) -> StateDict:
        is_current = self.in_pass and loader is self._loaders.get(self._pass)
        return loader_state.loader_state(loader, self.batch if is_current else None)

    def _find_batch(self, saved: Mapping[str, Any]) -> int:
        """Return the index of the batch in which the next sample is; batches may have another size now."""
        if self._world_size_changed:
            if self._length and saved.get("length"):
                return int(saved["batch"] * self._length // saved["length"])
            return int(saved["batch"])
        batch, self._samples_before = self._size.find(saved)
        return batch

    def _capture(self) -> StateDict:
        generators = {name: rng.state_of(generator) for name, generator in self._generators.items()}
        return {"rng": rng.capture(), "handed": generators}

    def _restore_rng(self, state: Mapping[str, Any]) -> None:
        rng.restore(state["rng"])
        for name, generator_state in state["handed"].items():
            rng.set_state(self._generators[name], generator_state)


def length(loader: object) -> int | None:
    """Return the number of batches of a loader; ``None`` if it has no length."""
    try:
        return len(loader)  # type: ignore[arg-type]  # any object may be a loader
    except Exception:  # noqa: BLE001 - a loader's own `__len__` may raise anything, and an iteration needs none
        return None
