"""What runs in the workers of a ``DataLoader``: each batch takes the states of its worker's generators along.

The objects here are pickled for workers that are started with ``spawn`` or ``forkserver``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass
class BatchWithStates:
    """A batch on its way from a worker to the training process.

    Attributes:
        batch: What the loader's ``collate_fn`` returned.
        worker: The number of the worker.
        changed: By the number of the generator, the packed states that the worker has not sent yet.
        is_restored: False if the worker had other generators than those whose states it was given.
    """

    batch: Any
    worker: int
    changed: dict[int, bytes]
    is_restored: bool

    def pin_memory(self) -> BatchWithStates:
        """Pin the batch; torch's pinning thread calls this."""
        self.batch = pin_memory(self.batch)  # type: ignore[no-untyped-call]  # torch leaves it so
        return self


class WorkerHooks:
    """The ``worker_init_fn`` and the ``collate_fn`` of a loader, each with ours around it.

    Args:
        worker_init_fn: The loader's own.
        collate_fn: The loader's own.
        start: By worker, the states of its generators; a worker without states starts from its seed.
    """

    def __init__(
        self,
        worker_init_fn: Callable[[int], object] | None,
        collate_fn: Callable[[Any], Any],
        start: Mapping[int, Sequence[Any]],
    ) -> None:
        self._worker_init_fn = worker_init_fn
        self._collate_fn = collate_fn
        self._start = start
        self._is_restored = True
        self._generators: list[Any] = []
        self._sent: list[bytes] = []

    def init(self, worker_id: int) -> None:
        """Call the loader's ``worker_init_fn``, then restore the worker's generators."""
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)
        if worker_id in self._start:
            generators, states = self._find_generators(), self._start[worker_id]
            self._is_restored = len(generators) == len(states)
            rng.restore_all(generators, states)

    def collate(self, samples: Any) -> BatchWithStates:
        """Collate the samples of a batch, and add the states that have changed since the worker's last batch."""
        batch = self._collate_fn(samples)
        if not self._generators:  # a dataset may create some with its first sample
            self._generators = self._find_generators()
            self._sent = [b""] * len(self._generators)
        packed = [rng.pack_state(generator) for generator in self._generators]
        changed = {at: new for at, (new, old) in enumerate(zip(packed, self._sent, strict=True)) if new != old}
        self._sent = packed
        worker: Any = get_worker_info()
        return BatchWithStates(batch, worker.id, changed, self._is_restored)

    def _find_generators(self) -> list[Any]:
        worker: Any = get_worker_info()
        return [*rng.global_generators(), *rng.find_generators([worker.dataset, self._collate_fn])]
