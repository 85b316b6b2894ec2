"""Keep every sink of a run up to date with its journal, independently of the other sinks."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import MissingPackageError, TrackoptError
from trackopt.recorder.child_process import LOG_NAME
from trackopt.recorder.cursor import Cursor, CursorFile, UploadCursor
from trackopt.recorder.delivery import Delivery
from trackopt.recorder.starvation import release_memory
from trackopt.rundir.identity import read_identity
from trackopt.utils.lock import lock, lock_holder, try_lock
from trackopt.utils.mlflow_uri import redact_credentials
from trackopt.utils.packages import explain_missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from trackopt.recorder.sinks.base import Sink
    from trackopt.recorder.sinks.mlflow_artifacts import ArtifactUploader

_MIN_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0


@dataclass(frozen=True)
class _Backoff:
    """The pause of a failing sink.

    Attributes:
        until: When it ends.
        seconds: How long it is.
        reason: Why the sink fails, in one line.
        is_permanent: No retry helps until the user changes something, so the end of the run does not wait for one.
    """

    until: float
    seconds: float
    reason: str
    is_permanent: bool = False


class Recorder:
    """Deliver one run. A second recorder of the same run waits for the first to end.

    Args:
        directory: The run's directory.
        notify: Called with messages for the user, for example when a sink fails or works again.
        replaces_other: Kill the first instead, which may get no processor: somebody waits for the delivery.
    """

    def __init__(self, directory: Path, notify: Callable[[str], None], *, replaces_other: bool = False) -> None:
        self._directory = directory
        self._notify = notify
        self._log = (directory / LOG_NAME).open("ab", buffering=0)
        if not try_lock(self._log.fileno()):
            if replaces_other:
                _kill_holder(directory / LOG_NAME)
            lock(self._log.fileno())
        identity = read_identity(directory)
        # Relative paths (of an SQLite file, of artifacts) are relative to the training's working directory.
        try:
            os.chdir(identity.working_directory)
        except OSError:  # the run was copied from another machine
            self._notify(
                f"working directory {identity.working_directory} does not exist; "
                f"relative paths are resolved in {Path.cwd()}"
            )
        self._names: list[str] = list(identity.sinks or ())  # absent if killed before the first attempt began
        self._journal = directory / journal.NAME
        self._deliveries: dict[str, Delivery | ArtifactUploader] = {}
        self._backoffs: dict[str, _Backoff] = {}
        self._cursors = CursorFile(directory)
        self._save_lock = threading.Lock()
        self._notified: set[str] = set()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for delivery in self._deliveries.values():
            delivery.close()
        self._log.close()

    def deliver(self) -> bool:
        """Send each sink its next batch of records; return whether there are more.

        The first failure of a sink is reported, and the sink is retried after a pause.
        """
        size = self._journal.stat().st_size
        has_more = [
            self._try(name, lambda delivery: delivery.deliver(size))
            for name in self._names
            if name not in self._backoffs or time.monotonic() >= self._backoffs[name].until
        ]
        self._save_cursors()
        return any(has_more)

    def drain(self, on_progress: Callable[[], None] = lambda: None, *, timeout: float = 0.0) -> list[str]:
        """Send all remaining records and the run's status; return the sinks that did not take everything.

        Args:
            on_progress: Called after each batch.
            timeout: How many seconds to retry a sink that fails. A failed import or a refused login is not retried.
        """
        size = self._journal.stat().st_size
        end = time.monotonic() + timeout
        remaining, failed = self._names, list[str]()
        while True:
            remaining = [name for name in remaining if not self._flush_sink(name, size, on_progress)]
            failed += [name for name in remaining if self._backoffs[name].is_permanent]
            remaining = [name for name in remaining if name not in failed]
            next_retry = min((self._backoffs[name].until for name in remaining), default=end)
            if next_retry >= end:
                return remaining + failed
            time.sleep(max(0.0, next_retry - time.monotonic()))

    def _flush_sink(self, name: str, size: int, on_progress: Callable[[], None]) -> bool:
        """Send a sink the rest of the journal's first ``size`` bytes and the status; return whether it took all."""

        def deliver_or_finish(delivery: Delivery | ArtifactUploader) -> bool:
            has_more = bool(delivery.deliver(size))
            if not has_more:
                delivery.finish()
            return has_more

        while self._try(name, deliver_or_finish):
            self._save_cursors()
            on_progress()
        self._save_cursors()
        return name not in self._backoffs

    def _try(self, name: str, action: Callable[[Delivery | ArtifactUploader], bool | None]) -> bool:
        """Run an action on a sink and return its result; a failure is logged and starts the sink's next pause."""
        try:
            delivery = self._get_delivery(name)
        except Exception as error:  # noqa: BLE001 - a failing sink must not stop the others
            self._handle_failure(name, error, can_import=False)
            return False
        try:
            has_more = action(delivery)
        except Exception as error:  # noqa: BLE001 - whatever a sink or its package raises
            self._handle_failure(name, error)
            return False
        if has_more is not None and name in self._backoffs:
            del self._backoffs[name]
            self._notify(f"the {name} sink works again")
        return bool(has_more)

    def _handle_failure(self, name: str, error: Exception, *, can_import: bool = True) -> None:
        with contextlib.suppress(OSError):  # the disk may be full
            self._log.write(redact_credentials(traceback.format_exc()).encode())
        previous, reason = self._backoffs.get(name), failure_reason(error)
        if previous is None:
            self._notify(
                f"the {name} sink fails ({reason}); training continues and the journal keeps all records; to deliver "
                f"them later, run `trackopt sync {self._directory}`"
            )
        elif _without_numbers(previous.reason) != _without_numbers(reason):
            self._notify(f"the {name} sink fails for another reason ({reason})")
        seconds = min(2 * previous.seconds, _MAX_BACKOFF_S) if previous else _MIN_BACKOFF_S
        if isinstance(error, (ImportError, MissingPackageError)):
            seconds = math.inf  # a retry in the same process does not help
        is_permanent = not can_import or _is_refusal(error)
        self._backoffs[name] = _Backoff(time.monotonic() + seconds, seconds, reason, is_permanent)

    def _get_delivery(self, name: str) -> Delivery | ArtifactUploader:
        if name not in self._deliveries:
            self._deliveries[name] = self._make_delivery(name)
        return self._deliveries[name]

    @explain_missing("it")
    def _make_delivery(self, name: str) -> Delivery | ArtifactUploader:
        if name != "artifacts":
            connect = _load_sink(name, self._directory)
            return Delivery(self._journal, connect, self._cursors.load(name, Cursor), self._notify_once)
        _prepare_mlflow()
        from trackopt.recorder.sinks.mlflow_artifacts import ArtifactUploader

        cursor = self._cursors.load(name, UploadCursor)
        return ArtifactUploader(self._directory, cursor, self._notify, self._save_cursors)

    def _notify_once(self, message: str) -> None:
        """Tell the user what every sink finds in the journal only once."""
        if message not in self._notified:
            self._notified.add(message)
            self._notify(message)

    def _save_cursors(self) -> None:
        with self._save_lock:  # the upload thread saves, too
            self._cursors.save({name: delivery.cursor for name, delivery in self._deliveries.items()})


def _kill_holder(path: Path) -> None:
    """Kill the process that has locked a file, where the system says which it is."""
    holder = lock_holder(path)
    if sys.platform != "win32" and holder is not None and holder != os.getpid():
        with contextlib.suppress(OSError):  # it has just exited
            os.kill(holder, signal.SIGKILL)
            release_memory(holder)


def _load_sink(name: str, directory: Path) -> Callable[[int], Sink]:
    """Import the backend of a sink, and return a function that opens it.

    Each backend is imported separately, so that a missing one does not stop the other.
    """
    if name == "tensorboard":
        from trackopt.recorder.sinks.tensorboard import TensorBoardSink

        return lambda step: TensorBoardSink(directory, step)
    if name == "mlflow":
        _prepare_mlflow()
        from trackopt.recorder.sinks.mlflow import MLflowSink

        return lambda _: MLflowSink(directory)
    raise TrackoptError(f"unknown sink '{name}'; choose from tensorboard, mlflow")


def _prepare_mlflow() -> None:
    """Import MLflow, and limit its retries, which would wait minutes for a server that is down.

    The recorder retries itself. One retry remains, for a connection that the server has closed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout belongs to `trackopt sync`
    from trackopt.recorder.sinks.mlflow_import import import_mlflow

    import_mlflow()


def _is_refusal(error: Exception) -> bool:
    """Return whether MLflow's server has refused the login, or the user's rights do not suffice."""
    get_status = getattr(error, "get_http_status_code", None)
    return get_status is not None and get_status() in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


def failure_reason(error: BaseException) -> str:
    """Return the line that says most about a failure: a message of trackopt's, or that of the innermost exception.

    Example:
        >>> try:
        ...     try:
        ...         raise OSError(28, "No space left on device")
        ...     except OSError as error:
        ...         raise RuntimeError("the write failed, for a long reason") from error
        ... except RuntimeError as error:
        ...     failure_reason(error)
        'No space left on device'
    """
    reason, inner = type(error).__name__, error
    while True:
        message = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner)
        if message.strip():
            reason = message.strip().splitlines()[0]
        following = inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)
        if following is None or isinstance(inner, TrackoptError):
            return redact_credentials(reason)
        inner = following


def _without_numbers(reason: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "", reason)
