"""Lightning: what ``trainer.fit(…, ckpt_path=…)`` does not restore."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")


class DataPosition:
    """Restores the random generators and the position in the data, where Lightning begins the epoch's data again.

    A validation leaves the generators as they were: Lightning does not repeat one that follows a checkpoint.

    Args:
        trainer: Its ``fit`` has begun.
        state: What ``state_dict`` returned when the checkpoint was taken; ``None`` if training begins.
    """

    def __init__(self, trainer: Trainer, state: Mapping[str, Any] | None) -> None:
        self._trainer = trainer
        self._resumed = state
        self._pass_start: StateDict = {}  # the generators before the latest pass over the data
        self._rewinds = False  # the generators were set back to it after the pass had begun
        self._after_batch: StateDict | None = None
        self._skips_validation = skips_validation(trainer)
        if state is not None:
            rng.restore(state["random"])
            self._restore_loader(state["loader"])
        self.follow()

    def follow(self) -> None:
        """Follow the passes over the loaders; Lightning has begun the first one before any hook."""
        fetcher = self._trainer.fit_loop._data_fetcher
        if fetcher is None or isinstance(fetcher.combined_loader, _Passes):
            return
        if math.isinf(self._trainer.num_training_batches):
            logger.warning("trackopt: the loader has no length, so its position in the data is not restored")
            return
        fetcher.setup(_Passes(fetcher.combined_loader, partial(self._begin_pass, rewinds=self._resumed is None)))
        iter(fetcher)
        fetcher.setup(_Passes(fetcher.combined_loader.loader, self._begin_pass))

    def begin_epoch(self) -> None:
        """Restore the generators again: the hooks of the beginning may have drawn from them."""
        if self._resumed is not None:
            rng.restore(self._resumed["random"])
        self.follow()

    def end_batch(self) -> None:
        """Note the generators before a validation."""
        self._after_batch = rng.capture()

    def end_validation(self) -> None:
        """Set the generators back."""
        if self._after_batch is not None:
            rng.restore(self._after_batch)

    def state_dict(self) -> StateDict:
        """Return the position: the batches of the pass, and the generators when it began and now."""
        return {
            "pass_start": self._pass_start,
            "rewinds": self._rewinds,
            "batches": self._batches_begun(),
            "has_gradients": self._trainer.lightning_module.automatic_optimization
            and self._trainer.fit_loop._should_accumulate(),
            "random": rng.capture(),
            "loader": self._loader_states(),
        }

    def _begin_pass(self, loader: CombinedLoader, *, rewinds: bool = False) -> Iterator[Any]:
        """Begin a pass when its first batch is asked for: the one of the checkpoint, or a new one."""
        state, self._resumed = self._resumed, None
        done = self._batches_begun()
        if state is not None and not done and self._skips_validation:  # Lightning has begun its pass over the data
            rng.restore(state["random"])
        if state is None or not done:
            self._pass_start, self._rewinds = {"random": rng.capture(), "loader": self._loader_states()}, rewinds
            return self._begun(loader)
        if done != state["batches"]:
            logger.warning(
                "trackopt: the checkpoint was taken within an iteration, which Lightning repeats with other random "
                "numbers: the resume is not exact"
            )
        if state["has_gradients"]:
            logger.warning(
                "trackopt: the checkpoint was taken between two steps, and Lightning does not save the accumulated "
                "gradients: the resume is not exact"
            )
        self._pass_start, self._rewinds = state["pass_start"], state["rewinds"]
        rng.restore(self._pass_start["random"])
        self._restore_loader(self._pass_start["loader"])
        batches = self._begun(loader)
        for _ in range(done):
            next(batches)
        rng.restore(state["random"])
        return batches

    def _begun(self, loader: CombinedLoader) -> Iterator[Any]:
        batches: Iterator[Any] = iter(loader)
        if self._rewinds:
            rng.restore(self._pass_start["random"])
        return batches

    def _batches_begun(self) -> int:
        return int(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _loader_states(self) -> list[Any]:
        return [rng.state_of(each) for each in rng.find_generators(self._trainer.train_dataloader)]

    def _restore_loader(self, states: list[Any]) -> None:
        rng.restore_all(rng.find_generators(self._trainer.train_dataloader), states)


class _Passes:
    """Stands in for the loaders in Lightning's fetcher: a pass begins when its first batch is asked for."""

    def __init__(self, loader: CombinedLoader, begin: Callable[[CombinedLoader], Iterator[Any]]) -> None:
        self.loader = loader
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        batches = self._begin(self.loader)
        while True:  # `yield from` would begin another pass
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def reset(self) -> None:
        self.loader.reset()


def is_at_last_batch(trainer: Trainer) -> bool:
    """Return whether the checkpoint was taken after the last batch of an epoch, whose end Lightning then leaves out."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.ready == trainer.num_training_batches and progress.completed < progress.ready)


def skips_validation(trainer: Trainer) -> bool:
    """Return whether something depends on the end of the epoch that Lightning leaves out."""
    has_plateau = any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
    return is_at_last_batch(trainer) and (bool(trainer.enable_validation) or has_plateau)


def is_within_epoch(trainer: Trainer) -> bool:
    """Return whether the checkpoint was taken within an epoch, of whose metrics Lightning keeps only the rest."""
    return bool(0 < trainer.fit_loop.epoch_loop.batch_progress.current.ready < trainer.num_training_batches)
