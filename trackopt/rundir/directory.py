"""A run's directory: who the run is (``run.json``) and who holds it (a lock)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import sys
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from trackopt import journal
from trackopt.errors import RunError
from trackopt.rundir import environment
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FORMAT = 1
IDENTITY = "run.json"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_IDENTITY_LOCK = ".run.json.lock"
_LOCK_TIMEOUT_S = 30.0  # seconds that torchrun gives the processes that it stops before it starts others


class RunDirectory:
    """A run's directory, held by this process until ``release``.

    Args:
        path: The directory; it is made if need be. ``None`` is a fresh ``runs/<date-time>``. ``TRACKOPT_DIR`` in the
            environment goes before both.

    Attributes:
        path: The directory, absolute.
        identity: What ``run.json`` says; empty in a new one, until ``initialize``.

    Raises:
        RunError: It cannot be made or written, another process holds it, or it holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        chosen = os.environ.get("TRACKOPT_DIR") or path
        if (rehearsal := environment.from_environment()) is not None:
            self.path = rehearsal.directory(chosen)
        else:
            self.path = Path(chosen or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S-%f}").absolute()
        self.checkpoints = self.path / CHECKPOINTS
        self.journal = self.path / journal.NAME
        try:
            self._made = [each for each in (self.path, *self.path.parents) if not each.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
        self.identity: dict[str, Any] = {}
        try:
            self.identity = self._read()
        except BaseException:
            self.release()
            raise
        # A forked data worker would hold the lock for a while after its parent was killed.
        os.register_at_fork(after_in_child=self._release_lock)

    def initialize(self, name: str | None, mlflow: dict[str, Any]) -> None:
        """Make the directory that of a new run: write ``run.json``."""
        self.identity = {
            "format": FORMAT,
            "id": uuid.uuid4().hex,
            "name": name or self.path.name,
            "created": time.time(),
            "command": shlex.join(sys.orig_argv),
            "working_directory": str(Path.cwd()),
            "mlflow": mlflow,
            "attempt": 0,
        }
        write_identity(self.path, self.identity)
        for made in self._made or [self.path]:
            with contextlib.suppress(OSError):  # who may write in a directory may still not open the one above
                fsync_directory(made.parent)

    def begin_attempt(self, sinks: Sequence[str]) -> int:
        """Count this life of the training process, and let the recorder know where it wants to go."""
        self.identity = update_identity(
            self.path, lambda identity: {**identity, "attempt": identity["attempt"] + 1, "sinks": list(sinks)}
        )
        return int(self.identity["attempt"])

    def release(self) -> None:
        """Let another process have the directory; one that did not become a run's is left as it was found."""
        if not self.identity:
            with contextlib.suppress(OSError):  # then it stays, and is in nobody's way
                (self.path / _LOCK).unlink(missing_ok=True)
                if self._made:
                    self.path.rmdir()
        self._release_lock()

    def _acquire_lock(self) -> None:
        """Take the lock; where torchrun started this process in the place of another, that one may still let go."""
        end = time.monotonic() + (_LOCK_TIMEOUT_S if restart_count() else 0.0)
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.1)
            else:
                return

    def _release_lock(self) -> None:
        if self._lock >= 0:
            with contextlib.suppress(OSError):  # it is closed all the same
                os.close(self._lock)
            self._lock = -1

    def _read(self) -> dict[str, Any]:
        if (self.path / IDENTITY).exists():
            return read_identity(self.path)
        if self.journal.exists() or self.checkpoints.exists():
            raise RunError(
                f"{self.path}: holds a {journal.NAME if self.journal.exists() else CHECKPOINTS} but no {IDENTITY}, "
                "so it is not a run that can be continued; choose another dir"
            )
        return {}


class ReadOnlyRunDirectory(RunDirectory):
    """The directory as the processes see it that do not write there, since rank 0 does.

    Args:
        path: As rank 0 has it.
        identity: What ``run.json`` says there.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.checkpoints = path / CHECKPOINTS
        self.journal = Path(os.devnull)

    def begin_attempt(self, sinks: Sequence[str]) -> int:  # noqa: ARG002 - rank 0 wants something
        """Which life of the training this is; rank 0 counts it."""
        return int(self.identity["attempt"]) + 1

    def release(self) -> None:
        """It was never held."""


def restart_count() -> int:
    """How often torchrun has started the processes of this training again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def read_identity(path: Path) -> dict[str, Any]:
    """What ``run.json`` in a run's directory says.

    Raises:
        RunError: It is missing, unreadable, or written by a newer trackopt.
    """
    file = path / IDENTITY
    try:
        identity = orjson.loads(file.read_bytes())
        known = identity["format"] <= FORMAT and isinstance(identity["id"], str)
    except FileNotFoundError as error:
        raise RunError(f"{path}: not a run's directory (it has no {IDENTITY}); name one that wrap() made") from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); check the disk and the permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not a run's description; choose another dir") from error
    if not known:
        raise RunError(f"{file}: written by a newer trackopt; update this one, or choose another dir")
    return dict(identity)


def write_identity(path: Path, identity: dict[str, Any]) -> None:
    """Replace ``run.json`` as a whole; when this returns, no crash of the machine undoes it.

    Raises:
        RunError: It cannot be written.
    """
    atomic_write(path / IDENTITY, orjson.dumps(identity, option=orjson.OPT_INDENT_2), durable=True)


def update_identity(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Write ``run.json`` anew, as ``change`` makes it of what stands there; what that is.

    The training and the recorder of the attempt before it may both do so at the same time: one waits for the other.

    Raises:
        RunError: It cannot be read or written.
    """
    try:
        lock = (path / _IDENTITY_LOCK).open("ab")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); check its permissions") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        identity = change(read_identity(path))
        write_identity(path, identity)
    return identity


def atomic_write(file: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    Args:
        file: The file.
        content: What it is to hold.
        durable: Whether it must hold the new content even if the machine crashes then.

    Raises:
        RunError: It cannot be written.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)
        if durable:
            fsync_directory(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(f"{file}: cannot be written ({error.strerror}); check its directory") from error
