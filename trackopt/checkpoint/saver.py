"""When a run takes checkpoints, and the background thread that writes them."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from trackopt.checkpoint.async_write import AsyncWrite, lower_thread_priority
from trackopt.checkpoint.layout_cache import LayoutCache
from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.retention import RetentionMarks
from trackopt.checkpoint.sharded import ShardedCheckpoint
from trackopt.checkpoint.sharded_writer import ProcessGroupLost
from trackopt.checkpoint.snapshot import capture, check_saveable, estimate_nbytes
from trackopt.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.journal import Journal
    from trackopt.training.objects import Training

logger = logging.getLogger("trackopt")


@dataclass(frozen=True)
class SaveRequest:
    """A request for a checkpoint at the next point between two iterations.

    Attributes:
        marks: Its retention marks.
        wait: Whether the loop waits until it is on the disk.
    """

    marks: RetentionMarks = field(default_factory=RetentionMarks)
    wait: bool = False

    def merge(self, other: SaveRequest) -> SaveRequest:
        """Combine two requests for the same checkpoint."""
        return SaveRequest(self.marks.merge(other.marks), self.wait or other.wait)


@dataclass(frozen=True)
class SaveOptions:
    """When checkpoints become due by themselves.

    Attributes:
        save_every: Optimizer steps, or time, between two checkpoints; ``None`` for only those that are asked for.
        save_overlap: What a due checkpoint does while another is being written: ``"wait"`` or ``"skip"``.
    """

    save_every: int | timedelta | None = None
    save_overlap: str = "wait"


class CheckpointSaver:
    """The checkpoints of one attempt. One at a time is being written; the next one waits for it.

    Args:
        training: The live objects.
        store: Where checkpoints are committed.
        journal: It records each checkpoint, and is made durable with it.
        collectives: The processes of the training; rank 0 writes, unless the store is collective.
        options: When they become due by themselves.
        background: Whether the loop continues while they are written.

    Attributes:
        latest: The progress of the newest checkpoint that is known to be on the disk.
    """

    def __init__(
        self,
        training: Training,
        store: CheckpointStore,
        journal: Journal,
        collectives: Collectives,
        options: SaveOptions,
        *,
        background: bool,
    ) -> None:
        self.latest = RunProgress()
        self._training = training
        self._store = store
        self._journal = journal
        self._collectives = collectives
        self._save_every = options.save_every
        self._skip_when_busy = options.save_overlap == "skip"
        self._is_writer = collectives.is_rank_zero or store.is_collective
        self._background = background
        self._reported: set[str] = set()  # reasons of failures
        self._last_save_time = time.monotonic()
        self._due: SaveRequest | None = None
        self._in_flight: AsyncWrite | None = None
        self._held: AsyncWrite | None = None
        self._preparing: threading.Thread | None = None
        self._layouts = LayoutCache()

    @property
    def saves_by_itself(self) -> bool:
        """True if checkpoints become due during the training without a request."""
        return self._save_every is not None

    @property
    def due(self) -> bool:
        """True if a checkpoint is to be taken before the next iteration."""
        return self._due is not None

    def request(self, request: SaveRequest) -> None:
        """Ask for a checkpoint."""
        if self._held is not None and request.marks != RetentionMarks():
            logger.warning(
                "trackopt: the checkpoint of step %d was taken when the loop was left, without keep= and metric=; "
                "call run.save() with them inside the loop",
                self._held.progress.step,
            )
        self._last_save_time = time.monotonic()
        self._due = self._due.merge(request) if self._due is not None else request

    def on_step(self, before: int, step: int) -> None:
        """Request a checkpoint if one became due between two steps, and report one that has been written."""
        if self._in_flight is not None and not self._in_flight.is_alive():
            self.wait_until_finished()
        if isinstance(self._save_every, timedelta):
            due = self._collectives.world_size == 1 and self.is_overdue()
        else:
            due = self._save_every is not None and step // self._save_every > before // self._save_every
            due = due and not (self._skip_when_busy and self._collectives.broadcast(self._in_flight is not None))
        if due:
            self.request(SaveRequest())

    def is_overdue(self) -> bool:
        """Return whether a checkpoint is due by time.

        Several processes have a clock each; they save when rank 0's says so, at an iteration that they agree on.
        """
        if not isinstance(self._save_every, timedelta) or (self._skip_when_busy and self._in_flight is not None):
            return False
        return time.monotonic() - self._last_save_time >= self._save_every.total_seconds()

    def preallocate(self) -> None:
        """Allocate memory in the background; call it after the first step, when the size of the state is known."""
        if self._preparing is None and self._collectives.is_rank_zero:
            size = estimate_nbytes(self._training)  # in this thread, where nothing changes the state meanwhile
            self._preparing = threading.Thread(target=self._prepare, args=(size,), name="trackopt-prepare")
            self._preparing.start()

    def check_state(self) -> None:
        """Warn if the state of the objects cannot be saved; call it after the first step, when it is complete."""
        if not self._is_writer:
            return
        try:
            check_saveable(self._training)
        except Exception as error:  # noqa: BLE001 - it may come from the user's state_dict(); training continues
            self._report(_unsaveable(error))

    def hold(self, progress: RunProgress) -> bool:
        """Copy the state for the next save, unless ``release`` is called before; return whether that worked."""
        if not self._is_writer:
            return True
        request = self._due
        try:
            self._held = self._stage(progress)
        except CheckpointError as error:
            self._on_failed(progress, error)
        self._due = request
        return self._held is not None

    def release(self) -> None:
        """Forget the state that ``hold`` copied."""
        self._held = None

    def save(self, progress: RunProgress) -> None:
        """Copy the state, and write it in the background; a failed write is logged, and training continues."""
        if not self._is_writer:
            self._due = None
            return
        wait = not self._background or (self._due is not None and self._due.wait)
        try:
            self._in_flight = self._take(progress)
        except CheckpointError as error:
            self._on_failed(progress, error)
            return
        if not wait:
            self._in_flight.start()
            return
        self.wait_until_finished()

    def save_final(self, progress: RunProgress) -> None:
        """Save, and return when the checkpoint is on the disk.

        Raises:
            CheckpointError: It could not be written; the earlier ones are untouched.
        """
        if not self._is_writer:
            return
        try:
            error = self._on_written(self._take(progress))
        except CheckpointError as failure:
            error = failure
        if error is not None:
            self._mark_failed(progress, error)
            raise error

    def wait_until_finished(self, cause: BaseException | None = None) -> None:
        """Wait for the checkpoint that is being written, and report its outcome.

        Args:
            cause: The exception that ended the training, and perhaps the process group before the write was done.
        """
        writing, self._in_flight = self._in_flight, None
        if writing is None or (error := self._on_written(writing)) is None:
            return
        if cause is not None and isinstance(error, ProcessGroupLost):
            reason = f"the training ended with {type(cause).__name__}: {cause}".splitlines()[0].removesuffix(": ")
            error = ProcessGroupLost(error.path, f"{reason}, and the process group was destroyed during the write")
        self._on_failed(writing.progress, error)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and release the memory."""
        self.wait_until_finished()
        if self._preparing is not None:
            self._preparing.join()
        self._store.close()

    def _prepare(self, size: int) -> None:
        lower_thread_priority()
        self._store.preallocate(size)

    def _take(self, progress: RunProgress) -> AsyncWrite:
        """Return the copy that is held, or a new one."""
        held, self._held = self._held, None
        if held is None:
            return self._stage(progress)
        self._due = None
        return held

    def _stage(self, progress: RunProgress) -> AsyncWrite:
        """Copy the state; the memory is free once the checkpoint before it is written.

        Raises:
            CheckpointError: It cannot be copied, or holds something that cannot be saved.
        """
        self.wait_until_finished()
        if self._preparing is not None:
            self._preparing.join()
        request, self._due = self._due or SaveRequest(), None
        try:
            tree = capture(self._training, progress, None if self._store.is_collective else self._layouts)
            staged = self._store.stage(tree, request.marks)
        except CheckpointError:
            raise
        except Exception as error:  # of a state, or of the user's state_dict()
            failure = _unsaveable(error)
            if not self._store.is_collective:
                raise failure from error
            staged = ShardedCheckpoint({}, None, failure)  # the other processes wait for this one's part
        self._last_save_time = time.monotonic()
        return AsyncWrite(self._store, staged, progress, self._journal.sync)

    def _on_written(self, writing: AsyncWrite) -> CheckpointError | None:
        writing.finish()
        if writing.path is not None:
            self.latest = writing.progress
            path = f"{writing.path.parent.name}/{writing.path.name}"
            self._journal.mark("checkpoint", writing.progress.step, path=path)
        return writing.error

    def _on_failed(self, progress: RunProgress, error: CheckpointError) -> None:
        self._report(error)
        self._mark_failed(progress, error)

    def _report(self, error: CheckpointError) -> None:
        """Log an error, once for each reason."""
        if str(error) not in self._reported:
            self._reported.add(str(error))
            suffix = "" if isinstance(error, ProcessGroupLost) else "; training continues"
            logger.warning("trackopt: %s%s", error, suffix)

    def _mark_failed(self, progress: RunProgress, error: CheckpointError) -> None:
        self._journal.mark("checkpoint_failed", progress.step, reason=str(error))


def _unsaveable(error: Exception) -> CheckpointError:
    """Return the error for a state that cannot be saved; one that is not trackopt's is named with its class."""
    line = (str(error).splitlines() or [""])[0]
    reason = line if isinstance(error, UsageError) else f"{type(error).__name__}: {line}".removesuffix(": ")
    return CheckpointError(f"no checkpoint can be written ({reason})")
