"""The workers of a ``DataLoader``: where their generators stand, and how to continue there.

Worker ``w`` of ``n`` makes the batches ``w``, ``w + n``, ``w + 2n``, … of a pass, and works ahead of the loop. Each
batch brings the states of its worker's generators; those of the batches that the loop has taken are the position. To
return to it, the sampler skips the indices of the batches that were taken, and each worker starts from its states.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data._utils.worker import _IterableDatasetStopIteration
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from trackopt.run.worker_states import BatchWithStates, WorkerHooks
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")

_NOT_RESTORED = (
    "trackopt: the dataset creates random generators while its workers run, so the generators could not be restored "
    "and the samples differ from those of an uninterrupted run; create them in __init__ or in worker_init_fn"
)
_ITERATORS: WeakKeyDictionary[object, ref[TrackedIterator]] = WeakKeyDictionary()  # the latest of each loader


class TrackedIterator(_MultiProcessingDataLoaderIter):
    """Torch's iterator, whose batches bring the states of their workers.

    Args:
        loader: The loader.
        start: What ``worker_states`` returned, if the workers continue from there.
        skip: Batches of the pass that are not made, as the loop has taken them already.
        samples: Samples that are not made besides.
        is_idle: Only start the workers; the first pass begins with ``_reset``.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        start: StateDict | None,
        *,
        skip: int = 0,
        samples: int = 0,
        is_idle: bool = False,
    ) -> None:
        self._seed = start["seed"] if start else None
        states = start["states"] if start else {}
        self._packed: dict[int, dict[int, bytes]] = {}  # by worker and generator, of the batches taken
        self._before: tuple[int, dict[int, bytes] | None] = (0, None)  # of the latest batch's worker, before it
        self._restored = dict(states)  # of workers that have not made a batch since
        self._taken = self.skip = skip
        self.samples = samples
        self._is_idle = is_idle
        self._warned = False
        view = object.__new__(type(loader))
        vars(view).update(vars(loader))
        hooks = WorkerHooks(loader.worker_init_fn, loader.collate_fn, states)
        vars(view).update(worker_init_fn=hooks.init, collate_fn=hooks.collate)
        super().__init__(view)
        self._is_idle = False

    @property
    def _base_seed(self) -> int:
        """The seed of the workers: the saved one, if there is one. Torch draws another all the same."""
        assert self._seed is not None  # noqa: S101 - for mypy: torch has set it
        return int(self._seed)

    @_base_seed.setter
    def _base_seed(self, seed: int) -> None:
        if self._seed is None:
            self._seed = seed

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if not first_iter and self._finish_tasks():
            self._packed = self._packed_ahead()
        self._taken = self.skip
        super()._reset(loader, first_iter)

    def _try_put_index(self) -> None:
        if self._is_idle:
            return
        skip, self.skip, samples, self.samples = self.skip, 0, self.samples, 0
        skip_batches(self, skip, samples)
        for _ in range(skip % self._num_workers):
            next(self._worker_queue_idx_cycle)
        super()._try_put_index()

    def __next__(self) -> Any:
        """Return the next batch alone."""
        data = super().__next__()
        before = self._packed.get(data.worker)
        self._before = data.worker, before
        self._packed[data.worker] = {**(before or {}), **data.changed}
        self._taken += 1
        if not data.is_restored and not self._warned:
            self._warned = True
            logger.warning(_NOT_RESTORED)
        return data.batch

    def states(self, taken: int | None) -> StateDict | None:
        """Return the workers' states after so many batches of this pass, as plain values; ``None`` if unknown.

        Args:
            taken: Batches that the loop has taken: all that were drawn, or all but the latest. ``None`` between two
                passes, when the workers have finished what they were asked for.
        """
        packed = dict(self._packed)
        if taken is None:
            if not self._finish_tasks():
                return None
            packed = self._packed_ahead()
        elif taken == self._taken - 1:
            worker, before = self._before
            packed.pop(worker, None)
            packed |= {} if before is None else {worker: before}
        elif taken != self._taken:
            return None
        states = {worker: [rng.unpack_state(each[at]) for at in sorted(each)] for worker, each in packed.items()}
        return {"seed": self._base_seed, "states": {**self._restored, **states}}

    def _finish_tasks(self) -> bool:
        """Wait for the batches that a loop which was left early had asked for: the next pass would wait as well."""
        tasks = self._task_info
        try:
            while any(len(task) == 1 and self._workers_status[task[0]] for task in tasks.values()):
                at, data = self._get_data()  # type: ignore[no-untyped-call]  # torch leaves it so
                self._tasks_outstanding -= 1
                if isinstance(data, _IterableDatasetStopIteration):
                    self._workers_status[data.worker_id] = False
                else:
                    tasks[at] += (data,)
        except RuntimeError:  # a worker was killed
            return False
        return True

    def _packed_ahead(self) -> dict[int, dict[int, bytes]]:
        """Return the states after the batches that are made already, taken or not."""
        packed = dict(self._packed)
        for at in sorted(self._task_info):
            for data in self._task_info[at][1:]:
                if isinstance(data, BatchWithStates):
                    packed[data.worker] = {**packed.get(data.worker, {}), **data.changed}
        return packed


def is_trackable(loader: object) -> bool:
    """Return whether the states of a loader's workers can be read, and are of use.

    It is a ``DataLoader`` with torch's own iteration. Those workers of a stream that end with the pass are not tracked:
    the batches must be drawn again, and so the workers reach their states.
    """
    return (
        issubclass(type(loader), DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__  # type: ignore[attr-defined]
        and type(loader)._get_iterator is DataLoader._get_iterator  # type: ignore[attr-defined]
        and loader.num_workers > 0  # type: ignore[attr-defined]
        and getattr(loader, "in_order", True)
        and isinstance(getattr(loader, "_iterator", None), (TrackedIterator, type(None)))
        and (loader.persistent_workers or not isinstance(loader.dataset, IterableDataset))  # type: ignore[attr-defined]
    )


def begin_pass(
    loader: DataLoader[Any], start: StateDict | None = None, *, skip: int = 0, samples: int = 0
) -> Iterator[Any]:
    """Do what ``iter(loader)`` does, with workers whose states can be read.

    Args:
        loader: A loader that ``is_trackable``.
        start: Where the workers continue, if they are started now.
        skip: Batches of the pass that the loop has taken already.
        samples: Samples that it has taken besides.
    """
    running: Any = loader._iterator
    if running is not None:
        running.skip, running.samples = skip, samples
        running._reset(loader)
        return running  # type: ignore[no-any-return]
    loader.check_worker_number_rationality()
    return _start(loader, start, skip=skip, samples=samples)


def start_workers(loader: DataLoader[Any], start: StateDict | None) -> None:
    """Start persistent workers at given states, without a pass."""
    _start(loader, start, is_idle=True)


def skip_batches(iterator: Any, count: int, further: int = 0) -> None:
    """Skip the indices of ``count`` batches, and of further samples, of an iterator of torch's that has drawn none."""
    if count == further == 0:
        return
    sampler = iterator._index_sampler
    if type(sampler) is BatchSampler:  # skipping samples is several times as fast as building batches of them
        samples = iter(sampler.sampler)
        deque(islice(samples, count * sampler.batch_size + further), maxlen=0)
        iterator._sampler_iter = iter(BatchSampler(samples, sampler.batch_size, sampler.drop_last))
    else:
        with suppress(StopIteration):  # the loader has become shorter
            for _ in range(count):
                iterator._next_index()


def worker_states(loader: object, taken: int | None) -> StateDict | None:
    """Return the states of a loader's workers as ``TrackedIterator.states`` does; ``None`` without such workers."""
    try:
        iterator = _ITERATORS.get(loader, lambda: None)()
    except TypeError:  # any object may be a loader
        return None
    if iterator is None or (taken is None and not iterator._persistent_workers):
        return None
    return iterator.states(taken)


def _start(loader: Any, start: StateDict | None, **how: Any) -> TrackedIterator:
    iterator = TrackedIterator(loader, start, **how)
    _ITERATORS[loader] = ref(iterator)
    if loader.persistent_workers:
        loader._iterator = iterator
    return iterator
