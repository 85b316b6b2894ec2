"""The background thread that writes one checkpoint."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING

from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.checkpoint.meta import RunProgress
    from trackopt.checkpoint.sharded import ShardedCheckpoint
    from trackopt.checkpoint.staging import Staged
    from trackopt.checkpoint.store import CheckpointStore


class AsyncWrite(threading.Thread):
    """The write of one checkpoint. The interpreter waits for it at exit, since it is no daemon."""

    def __init__(
        self,
        store: CheckpointStore,
        staged: Staged | ShardedCheckpoint,
        progress: RunProgress,
        before_commit: Callable[[], None],
    ) -> None:
        super().__init__(name="trackopt-save")
        self.progress = progress
        self.path: Path | None = None
        self.error: CheckpointError | None = None
        self._store, self._staged, self._before_commit = store, staged, before_commit

    def run(self) -> None:
        """Write it, at low priority."""
        lower_thread_priority()
        self._write()

    def _write(self) -> None:
        try:
            self.path = self._store.commit(self._staged, self.progress.step, self._before_commit)
        except CheckpointError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - reported in the training's own thread
            self.error = CheckpointError(f"the checkpoint of step {self.progress.step}: not written ({error!r})")

    def finish(self) -> None:
        """Wait for the write; do it here if it was not started, as no thread starts while the interpreter exits."""
        if self.ident is None:
            self._write()
        else:
            self.join()


def lower_thread_priority() -> None:
    """Give this thread the lowest priority, so that training gets the cores first; this cannot be undone."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
