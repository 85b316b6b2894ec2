"""The state of a data loader: its generators, its workers, its count of passes; and how a pass is begun and resumed."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from trackopt.run import worker_tracking
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")

NO_STATE: StateDict = {"generators": [], "warm": False}
_QUIET_S = 2.0  # batches are drawn for so long before a line says so
_REFRESH_S = 0.5


@dataclass(frozen=True)
class LoaderSize:
    """How a loader divides its samples into batches, as far as it is known.

    Attributes:
        batch_size: Samples in a batch.
        samples: Samples in the dataset.
    """

    batch_size: int | None = None
    samples: int | None = None

    @classmethod
    def of(cls, loader: Any) -> LoaderSize:
        """Return the size of a loader of torch's; nothing is known of batches that a sampler of the user's makes."""
        if not _is_map_style(loader) or type(loader.batch_sampler) is not BatchSampler:
            return cls()
        try:
            return cls(loader.batch_size, len(loader.dataset))
        except Exception:  # noqa: BLE001 - the user's `__len__` may raise anything, and an iteration needs none
            return cls(loader.batch_size)

    def as_dict(self, batch: int, samples_before: int) -> StateDict:
        """Return the position after so many batches, and further samples, as plain values."""
        taken = None if self.batch_size is None else batch * self.batch_size + samples_before
        return {"batch_size": self.batch_size, "dataset_length": self.samples, "samples": taken}

    def find(self, saved: Mapping[str, Any]) -> tuple[int, int]:
        """Return the batches before a saved position, and the samples besides; say so if the size has changed."""
        batch, taken = int(saved["batch"]), saved.get("samples")
        if self.batch_size is None or taken is None:
            return batch, 0
        taken = min(taken, saved["dataset_length"] or taken)  # the last batch may have been smaller
        pairs = (("batch_size", self.batch_size), ("dataset_length", self.samples))
        if changes := [
            f"{key.replace('dataset_length', 'the length of the dataset')} was {saved[key]}, here it is {now}"
            for key, now in pairs
            if None not in {saved[key], now} and saved[key] != now
        ]:
            order = " in another order" if saved["dataset_length"] != self.samples else ""
            logger.warning("trackopt: %s: the epoch continues after %d samples%s", "; ".join(changes), taken, order)
        if taken == self.samples:  # a sampler draws once more behind its last sample, for the last, smaller batch
            return -(-int(taken) // self.batch_size), 0
        batch, rest = divmod(int(taken), self.batch_size)
        return batch, rest


def loader_state(loader: object, taken: int | None = None) -> StateDict:
    """Return a loader's own generators, its workers, and its count of passes.

    Args:
        loader: The loader.
        taken: Batches that the loop has taken in the current pass; ``None`` if there is no pass over this loader.
    """
    return {
        "generators": [rng.state_of(generator) for generator in rng.find_generators(loader)],
        "warm": getattr(loader, "_iterator", None) is not None,
        "counted": getattr(loader, "iteration", None) if hasattr(loader, "set_epoch") else None,
        "num_workers": getattr(loader, "num_workers", 0),
        "workers": worker_tracking.worker_states(loader, taken),
    }


def restore_loader(loader: Any, own: Mapping[str, Any]) -> None:
    """Restore a loader's state from the beginning of a pass; Accelerate's loaders shuffle by the number of the pass."""
    rng.restore_all(rng.find_generators(loader), own["generators"])
    if (iteration := own.get("counted")) is not None:
        loader.set_epoch(iteration)


def start_workers(loader: Any, own: Mapping[str, Any]) -> None:
    """Start persistent workers, where they had been started, without changing any generator of this process.

    Only the first pass of a loader draws the seed of its workers.

    Args:
        loader: The loader.
        own: Its state; its workers continue from there.
    """
    if not own["warm"] or not getattr(loader, "persistent_workers", False) or loader._iterator is not None:
        return
    before = rng.capture(), [rng.state_of(generator) for generator in rng.find_generators(loader)]
    if worker_tracking.is_trackable(loader):
        worker_tracking.start_workers(loader, _worker_start(loader, own))
    else:
        iter(loader)
    rng.restore(before[0])
    rng.restore_all(rng.find_generators(loader), before[1])


def begin_pass(loader: Iterable[Any]) -> Iterator[Any]:
    """Begin a pass, as ``iter(loader)`` does."""
    if worker_tracking.is_trackable(loader):
        return worker_tracking.begin_pass(loader)  # type: ignore[arg-type]  # it is a DataLoader
    return iter(loader)


def resume_pass(loader: Any, own: Mapping[str, Any], count: int, samples: int = 0) -> Iterator[Any]:
    """Begin a pass whose first ``count`` batches were taken already.

    A loader without workers loads its samples with generators that are restored afterwards, so drawing the indices of
    those batches is enough. So it is with workers that start from saved states. For any other iterable the batches
    themselves must be drawn.

    Args:
        loader: The loader.
        own: Its state after those batches.
        count: The number of those batches.
        samples: The number of samples that were taken besides.
    """
    workers = _worker_start(loader, own)
    tracked, saved = worker_tracking.is_trackable(loader), own.get("num_workers")
    if (
        _is_map_style(loader)
        and tracked
        and (workers is not None or samples or saved not in {None, loader.num_workers})
    ):
        return worker_tracking.begin_pass(loader, workers, skip=count, samples=samples)
    iterator = begin_pass(loader)
    if _is_map_style(loader) and loader.num_workers == 0 and hasattr(iterator, "_sampler_iter"):
        worker_tracking.skip_batches(iterator, count, samples)
    else:
        _draw(iterator, loader, count)
    return iterator


def warn_if_inexact(loader: Any, own: Mapping[str, Any], at_start: Mapping[str, Any]) -> None:
    """Say why the workers of a resumed pass cannot make the samples that they would have made.

    Args:
        loader: The loader.
        own: Its state at the checkpoint.
        at_start: Its state when the pass began.
    """
    saved, now = own.get("num_workers"), getattr(loader, "num_workers", 0)
    if saved not in {None, now}:
        _warn(f"saved with num_workers={saved}, resumed with {now}: random transforms draw other numbers from here on")
    elif not now:
        return
    elif not getattr(loader, "in_order", True):
        _warn("in_order=False: the order of the batches, and with it the resumed run, is not reproducible")
    elif type(loader).__name__ == "StatefulDataLoader":
        _warn(
            "a StatefulDataLoader does not save the random generators of its workers, so random transforms draw other "
            "numbers from here on; use a DataLoader"
        )
    elif at_start["warm"] and own.get("workers") is None:
        _warn(
            "the random generators of this loader's persistent workers were not saved, so random transforms draw "
            "other numbers from here on; use persistent_workers=False, or a torch DataLoader without an own __iter__ "
            "that only run.batches() iterates over"
        )
    elif at_start["warm"] and not _is_map_style(loader):
        _warn(
            "persistent workers of an IterableDataset: exact only if the stream draws no random numbers after its last "
            "batch"
        )


def _is_map_style(loader: object) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _worker_start(loader: Any, own: Mapping[str, Any]) -> StateDict | None:
    """Return the saved states of the workers, if this loader has as many."""
    workers: StateDict | None = own.get("workers")
    return workers if own.get("num_workers") == getattr(loader, "num_workers", 0) else None


def _draw(iterator: Iterator[Any], loader: object, count: int) -> None:
    """Draw batches that were taken already; if it takes long, say so."""
    begin = time.monotonic()
    due, said = begin + _QUIET_S, False
    for done in range(count):
        next(iterator, None)
        if time.monotonic() < due:
            continue
        if not said:
            logger.warning(
                "trackopt: drawing the %d batches that were trained on, as %s", count, _reason_for_drawing(loader)
            )
        said, due = True, time.monotonic() + _REFRESH_S
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"\rtrackopt: {done + 1}/{count} batches drawn")
            sys.stderr.flush()
    if said and sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"\rtrackopt: {count}/{count} batches drawn\n")


def _reason_for_drawing(loader: object) -> str:
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return "an IterableDataset cannot skip samples (torchdata's StatefulDataLoader can save its position)"
    if isinstance(loader, DataLoader):
        return "the generators of this loader's workers were not saved"
    return "this iterable is no DataLoader"


def _warn(reason: str) -> None:
    logger.warning("trackopt: not resumed exactly: %s", reason)
