"""A run's directory, held by one process at a time."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import RunError
from trackopt.rundir import environment
from trackopt.rundir.identity import IDENTITY, RunIdentity, read_identity, update_identity, write_identity
from trackopt.utils.files import fsync_directory
from trackopt.utils.lock import try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trackopt.utils.mlflow_uri import MLflowTarget

CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_LOCK_TIMEOUT_S = 30.0  # torchrun gives the processes that it stops as long before it starts others
_STATUS_TIMEOUT_S = 0.3  # `is_running` may hold the lock for a moment
_LOCK_POLL_INTERVAL_S = 0.1
_HELD: dict[Path, RunDirectory] = {}  # by this process


class RunDirectory:
    """A run's directory, held by this process until ``release``.

    Args:
        path: The directory; it is created if needed. ``None`` creates ``runs/<date-time>``. ``TRACKOPT_DIR`` in the
            environment overrides both.
        is_final: Nothing overrides the path.

    Attributes:
        path: The directory, absolute.
        saved_identity: The content of ``run.json``; ``None`` in a new directory, until ``initialize``.
        hand_over: Closes the run in it for another one of this process, if it may be closed; returns whether it did.

    Raises:
        RunError: The directory cannot be created or written, is held by another process, or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, is_final: bool = False) -> None:
        chosen = path if is_final else os.environ.get("TRACKOPT_DIR") or path
        if (rehearsal := environment.from_environment()) is not None:
            self.path = rehearsal.directory(chosen)
        else:
            self.path = Path(chosen or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S-%f}").absolute()
        self.checkpoints = self.path / CHECKPOINTS
        self.journal = self.path / journal.NAME
        self.saved_identity: RunIdentity | None = None
        self.hand_over: Callable[[], bool] = _refuse
        if (held := _HELD.get(self.path)) is not None and not held.hand_over():
            raise RunError(f"{self.path}: this process has a run open in it; close that one, or choose another dir")
        try:
            self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be used ({error.strerror}); choose a dir that can be written"
            ) from error
        try:
            self._acquire_lock()
        except OSError as error:
            self._release_lock()
            reason = "open in another process" if isinstance(error, BlockingIOError) else error.strerror
            raise RunError(f"{self.path}: {reason}; stop that one, or choose another dir") from error
        _HELD[self.path] = self
        try:
            self.saved_identity = self._read()
        except BaseException:
            self.release()
            raise
        if sys.platform != "win32":
            # A forked data worker would hold the lock for a while after its parent was killed.
            os.register_at_fork(after_in_child=self._release_lock)

    @property
    def identity(self) -> RunIdentity:
        """The content of ``run.json`` of a directory that holds a run."""
        assert self.saved_identity is not None  # noqa: S101 - for mypy: `initialize` came first
        return self.saved_identity

    def initialize(self, name: str | None, mlflow: MLflowTarget) -> None:
        """Write ``run.json`` of a new run."""
        self.saved_identity = RunIdentity.new(name or self.path.name, mlflow)
        write_identity(self.path, self.saved_identity)
        for created in self._created or [self.path]:
            with contextlib.suppress(OSError):  # a directory may be writable while its parent cannot be opened
                fsync_directory(created.parent)

    def begin_attempt(self, sinks: Sequence[str]) -> int:
        """Count a new attempt, and name its sinks for the recorder; return its number."""
        self.saved_identity = identity = update_identity(
            self.path, lambda saved: replace(saved, attempt=saved.attempt + 1, sinks=tuple(sinks))
        )
        return identity.attempt

    def release(self) -> None:
        """Release the lock; leave a directory that did not become a run's as it was."""
        if self.saved_identity is None:
            if sys.platform == "win32":  # an open file cannot be removed there
                self._release_lock()
            with contextlib.suppress(OSError):  # what stays does no harm
                (self.path / _LOCK).unlink(missing_ok=True)
                if self._created:
                    self.path.rmdir()
        self._release_lock()

    def _acquire_lock(self) -> None:
        """Take the lock; a process that torchrun restarts waits for its predecessor to release it."""
        end = time.monotonic() + (_LOCK_TIMEOUT_S if restart_count() else _STATUS_TIMEOUT_S)
        while not try_lock(self._lock):
            if time.monotonic() >= end:
                raise BlockingIOError
            time.sleep(_LOCK_POLL_INTERVAL_S)

    def _release_lock(self) -> None:
        self.hand_over = _refuse  # the hook for forks keeps this object, which must not keep the training
        if _HELD.get(self.path) is self:
            del _HELD[self.path]
        if self._lock >= 0:
            with contextlib.suppress(OSError):  # the descriptor is closed even then
                os.close(self._lock)
            self._lock = -1

    def _read(self) -> RunIdentity | None:
        if (self.path / IDENTITY).exists():
            return read_identity(self.path)
        if self.journal.exists() or self.checkpoints.exists():
            raise RunError(
                f"{self.path}: holds a {journal.NAME if self.journal.exists() else CHECKPOINTS} but no {IDENTITY}, "
                "so it is not a run that can be continued; choose another dir"
            )
        return None


def _refuse() -> bool:
    return False


class ReadOnlyRunDirectory(RunDirectory):
    """The directory on every rank but rank 0, which alone writes there.

    Args:
        path: The directory.
        identity: The content of ``run.json``; ``None`` until rank 0 has written it.
    """

    def __init__(self, path: Path, identity: RunIdentity | None) -> None:
        self.path = path
        self.saved_identity = identity
        self.checkpoints = path / CHECKPOINTS
        self.journal = Path(os.devnull)

    def begin_attempt(self, sinks: Sequence[str]) -> int:  # noqa: ARG002 - rank 0 writes them
        """Return the number of this attempt, which rank 0 counts."""
        return self.identity.attempt + 1

    def release(self) -> None:
        """Do nothing: this process holds no lock."""


def is_running(directory: Path) -> bool:
    """Return whether a process holds the lock of a run's directory.

    Linux lists the locks. Elsewhere the lock is tried, which takes it for a moment. Raises OSError.
    """
    file = directory / _LOCK
    try:
        inode = file.stat().st_ino
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a sandbox may hide it
                locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
                return any(line.split()[1] == "FLOCK" and f":{inode} " in line for line in locks)
        with file.open("rb") as opened:
            return not try_lock(opened.fileno())
    except FileNotFoundError:
        return False


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this training."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
