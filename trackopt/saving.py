"""When a run takes a checkpoint, and what it does about one that cannot be written."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint import capture
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from trackopt.checkpoint import Store, Training
    from trackopt.journal import Journal

logger = logging.getLogger("trackopt")


class Saving:
    """The checkpoints of one attempt.

    Args:
        training: What they are taken of.
        store: Where they go.
        journal: What is told of them, and made durable with them.
        every: Optimizer steps, or time, between two of them; ``None`` for only those that are asked for.

    Attributes:
        latest: Step and position of the newest one.
    """

    def __init__(self, training: Training, store: Store, journal: Journal, every: int | timedelta | None) -> None:
        self.latest: tuple[int, Any] = (0, None)
        self._training = training
        self._store = store
        self._journal = journal
        self._every = every
        self._at = time.monotonic()
        self._due: bool | None = None  # to be taken at the next boundary; True: kept for good

    @property
    def due(self) -> bool:
        """Whether one is to be taken where the loop next stands between two iterations."""
        return self._due is not None

    def request(self, *, keep: bool = False) -> None:
        """Ask for one; with ``keep`` it is kept for good."""
        self._due = keep or bool(self._due)

    def advance(self, before: int, step: int) -> None:
        """The run went from step ``before`` to ``step``: perhaps it is time for one."""
        if isinstance(self._every, timedelta):
            due = time.monotonic() - self._at >= self._every.total_seconds()
        else:
            due = self._every is not None and step // self._every > before // self._every
        if due:
            self.request()

    def commit(self, progress: dict[str, Any]) -> None:
        """Take one now.

        Args:
            progress: What it says under ``trackopt`` beside what is found in the training itself.

        Raises:
            CheckpointError: It could not be written; the earlier ones are untouched.
        """
        keep, self._due = bool(self._due), None
        tree = capture(self._training, progress)
        path = self._store.commit(tree, keep=keep, before_commit=self._journal.sync)
        self.latest, self._at = (progress["step"], progress["position"]), time.monotonic()
        self._journal.mark("checkpoint", progress["step"], path=str(path.relative_to(self._journal.path.parent)))

    def try_to_commit(self, progress: dict[str, Any]) -> None:
        """Take one now; if it cannot be written, tell so and let training go on."""
        try:
            self.commit(progress)
        except CheckpointError as error:
            logger.warning("trackopt: %s; training goes on", error)
            self._journal.mark("checkpoint_failed", progress["step"], reason=str(error))
