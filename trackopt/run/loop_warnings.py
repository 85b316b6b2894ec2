"""Warnings about loops that cannot be saved or resumed as their author may expect; each once in an attempt."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from trackopt.run.unseen import have_advanced, is_enumerated, loader_positions

if TYPE_CHECKING:
    from types import FrameType

    from trackopt.run.data_position import DataPosition
    from trackopt.run.unseen import Positions
    from trackopt.telemetry.error_boundary import ErrorBoundary

_CHECKED_ITERATION = 2  # of an attempt: the first may draw for other purposes
_LOADER_CHECK = "check of the data loaders"

logger = logging.getLogger("trackopt")


class LoopWarnings:
    """Looks at the loop of one attempt.

    Args:
        position: Where the loop stands in its data.
        boundary: Makes the checks.

    Attributes:
        is_checked: True once the calls around iterations have nothing more to do.
    """

    def __init__(self, position: DataPosition, boundary: ErrorBoundary) -> None:
        self._position = position
        self._boundary = boundary
        self.is_checked = False
        self._iterations = 0
        self._loader_positions: Positions | None = None  # at the beginning of the iteration that is checked
        self._warned: set[str] = set()

    def check_sampler(self, loader: object) -> None:
        """Warn of a sampler that repeats an epoch's order; call it before a pass."""
        if self._boundary.call("sampler check", self._position.sampler_epoch_is_stale, loader):
            self._warn_once(
                "sampler",
                "the sampler shuffles every epoch in the same order; call its set_epoch(epoch) at the beginning of "
                "each epoch",
            )

    def check_enumerate(self, generator: FrameType) -> None:
        """Warn of an ``enumerate`` around the batches; call it at the first batch of a resumed pass."""
        if self._position.batch > 1 and self._boundary.call("check for enumerate()", is_enumerated, generator):
            self._warn_once(
                "enumerate",
                f"enumerate(run.batches(…)) counts from 0 again in a resumed epoch, here at batch "
                f"{self._position.batch - 1}; use run.enumerate(loader), or run.batch",
            )

    def begin_iteration(self) -> None:
        """Look where all loaders stand, in the second iteration of the attempt; the run's own has been drawn from."""
        self._iterations += 1
        if self._iterations == _CHECKED_ITERATION:
            self._loader_positions = self._boundary.call(_LOADER_CHECK, loader_positions)

    def end_iteration(self) -> None:
        """Warn of a ``DataLoader`` that the loop has drawn from by itself in the iteration that is checked."""
        before, self._loader_positions = self._loader_positions, None
        self.is_checked = self._iterations >= _CHECKED_ITERATION
        if before is None:
            return
        if self._boundary.call(_LOADER_CHECK, have_advanced, before):
            self._warn_once(
                "loader",
                "the loop iterates over a DataLoader itself, whose position is not saved, so that a resumed run may "
                "begin a new pass over it; take the batches from run.batches(loader)",
            )

    def warn_of_unended_steps(self, steps: int) -> None:
        """Warn of an epoch with several steps and no end of an iteration."""
        if steps > 1:
            self._warn_once(
                "epoch",
                f"epoch {self._position.epoch} took {steps} steps, and no iteration has ended in it, so checkpoints "
                "can be taken only between epochs: take the batches from run.batches(loader), or call run.step() "
                "after each step",
            )

    def warn_of_no_iterations(self, steps: int) -> None:
        """Warn of a training that took several steps and ended no iteration."""
        if steps > 1:
            self._warn_once(
                "iterations",
                f"{steps} steps, and no iteration has ended, so a resumed run begins its loop again: take the batches "
                "from run.batches(loader), or call run.step() at the end of each iteration",
            )

    def warn_of_nothing_left(self, epochs: int, step: int) -> None:
        """Say that a run that is started again is complete."""
        self._warn_once(
            "epochs",
            f"all {epochs} epochs are done, at step {step:,}, so nothing is left to train; pass a larger number of "
            "epochs to continue, or another dir to start a new run",
        )

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning("trackopt: %s", text)
