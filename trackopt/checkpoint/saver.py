"""When a run takes a checkpoint, how it gets to the disk beside the training, and what is told of it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.retention import Marks
from trackopt.checkpoint.snapshot import capture, nbytes
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from trackopt.checkpoint.sharded import Shards
    from trackopt.checkpoint.staging import Staged
    from trackopt.checkpoint.store import Store
    from trackopt.distributed.collectives import Ranks
    from trackopt.journal import Journal
    from trackopt.training.objects import Training

logger = logging.getLogger("trackopt")


@dataclass(frozen=True)
class Request:
    """A checkpoint that is to be taken where the loop next stands between two iterations.

    Attributes:
        marks: What it is to say about its worth.
        wait: Whether the loop waits until it is on the disk.
    """

    marks: Marks = field(default_factory=Marks)
    wait: bool = False

    def joined(self, other: Request) -> Request:
        """Both in one."""
        return Request(self.marks.joined(other.marks), self.wait or other.wait)


class Saving:
    """The checkpoints of one attempt. One at a time is on its way to the disk; the next one waits for it.

    Args:
        training: What they are taken of.
        store: Where they go.
        ranks: This process among those of the training; the first one writes, unless all write together.
        journal: What is told of them, and made durable with them.
        save_every: Optimizer steps, or time, between two of them; ``None`` for only those that are asked for.
        save_busy: Whether one that becomes due so while another is being written has to ``"wait"`` or to ``"skip"``.
        background: Whether the loop goes on while they are written.

    Attributes:
        latest: Step and position of the newest one that is on the disk, as far as ``settle`` and ``advance`` know.
    """

    def __init__(
        self,
        training: Training,
        store: Store,
        journal: Journal,
        ranks: Ranks,
        *,
        save_every: int | timedelta | None,
        save_busy: str,
        background: bool,
    ) -> None:
        self.latest: tuple[int, Any] = (0, None)
        self._training = training
        self._store = store
        self._journal = journal
        self._ranks = ranks
        self._every = save_every
        self._skips = save_busy == "skip"
        self._writes = ranks.leads or store.together
        self._background = background
        self._at = time.monotonic()
        self._due: Request | None = None
        self._writing: _Writing | None = None
        self._preparing: threading.Thread | None = None

    @property
    def due(self) -> bool:
        """Whether one is to be taken where the loop next stands between two iterations."""
        return self._due is not None

    def request(self, request: Request) -> None:
        """Ask for one."""
        self._at = time.monotonic()
        self._due = self._due.joined(request) if self._due is not None else request

    def advance(self, before: int, step: int) -> None:
        """The run went from step ``before`` to ``step``: perhaps it is time for one, or the last one is written."""
        if self._writing is not None and not self._writing.is_alive():
            self.settle()
        if isinstance(self._every, timedelta):
            due = self._ranks.world == 1 and self.is_overdue()
        else:
            due = self._every is not None and step // self._every > before // self._every
            due = due and not (self._skips and self._ranks.told(self._writing is not None))
        if due:
            self.request(Request())

    def is_overdue(self) -> bool:
        """Whether it is time for one, where time decides.

        Several processes have a clock each; they take a checkpoint when rank 0's says so, at an iteration that they
        agree on.
        """
        if not isinstance(self._every, timedelta) or (self._skips and self._writing is not None):
            return False
        return time.monotonic() - self._at >= self._every.total_seconds()

    def prepare(self) -> None:
        """Get the memory ready in the background; after the first step the size of the state is known."""
        if self._preparing is None and self._ranks.leads:
            size = nbytes(self._training)  # here, where nobody changes the state meanwhile
            self._preparing = threading.Thread(target=self._prepare, args=(size,), name="trackopt-prepare")
            self._preparing.start()

    def take(self, progress: Mapping[str, Any]) -> None:
        """Take one now: it is copied when this returns. If it cannot be written, that is told and training goes on.

        Args:
            progress: What it says under ``trackopt`` beside what is found in the training itself.
        """
        if not self._writes:
            self._due = None
            return
        wait = not self._background or (self._due is not None and self._due.wait)
        try:
            self._writing = self._staged(progress)
        except CheckpointError as error:
            self._fail(progress, error)
            return
        if not wait:
            self._writing.start()
            return
        self.settle()

    def take_last(self, progress: Mapping[str, Any]) -> None:
        """Take one now, and return when it is on the disk.

        Raises:
            CheckpointError: It could not be written; the earlier ones are untouched.
        """
        if self._writes and (error := self._finish(self._staged(progress))):
            raise error

    def settle(self) -> None:
        """Wait until nothing is on its way to the disk, and tell what became of it."""
        writing, self._writing = self._writing, None
        if writing is not None and (error := self._finish(writing)):
            self._fail(writing.progress, error)

    def close(self) -> None:
        """Wait for what is on its way, and let go of the memory."""
        self.settle()
        if self._preparing is not None:
            self._preparing.join()
        self._store.close()

    def _prepare(self, size: int) -> None:
        step_aside()
        self._store.prepare(size)

    def _staged(self, progress: Mapping[str, Any]) -> _Writing:
        """The state, copied; the memory is free once the one before it is written."""
        self.settle()
        if self._preparing is not None:
            self._preparing.join()
        request, self._due = self._due or Request(), None
        staged = self._store.stage(capture(self._training, progress), request.marks)
        self._at = time.monotonic()
        return _Writing(self._store, staged, progress, self._journal.sync)

    def _finish(self, writing: _Writing) -> CheckpointError | None:
        writing.finish()
        if writing.path is not None:
            self.latest = (writing.progress["step"], writing.progress["position"])
            path = f"{writing.path.parent.name}/{writing.path.name}"
            self._journal.mark("checkpoint", writing.progress["step"], path=path)
        return writing.error

    def _fail(self, progress: Mapping[str, Any], error: CheckpointError) -> None:
        logger.warning("trackopt: %s; training goes on", error)
        self._journal.mark("checkpoint_failed", progress["step"], reason=str(error))


class _Writing(threading.Thread):
    """One checkpoint on its way to the disk. The interpreter waits for it, since it is no daemon."""

    def __init__(
        self, store: Store, staged: Staged | Shards, progress: Mapping[str, Any], before_commit: Callable[[], None]
    ) -> None:
        super().__init__(name="trackopt-save")
        self.progress = progress
        self.path: Path | None = None
        self.error: CheckpointError | None = None
        self._store, self._staged, self._before_commit = store, staged, before_commit

    def run(self) -> None:
        step_aside()
        self._write()

    def _write(self) -> None:
        try:
            self.path = self._store.commit(self._staged, self.progress["step"], self._before_commit)
        except CheckpointError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - told where the training can hear it
            self.error = CheckpointError(f"the checkpoint of step {self.progress['step']}: not written ({error!r})")

    def finish(self) -> None:
        """Wait for it; one that was not started is written here, as no thread starts while the interpreter ends."""
        if self.ident is None:
            self._write()
        else:
            self.join()


def step_aside() -> None:
    """Let the training go before this thread wherever both want a core; there is no way back for it."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
