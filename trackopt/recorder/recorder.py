"""The recorder's work: every sink of a run kept up with its journal, each on its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import orjson

from trackopt import journal
from trackopt.errors import RunError, TrackoptError
from trackopt.recorder.child_process import LOG
from trackopt.recorder.delivery import Delivery
from trackopt.recorder.progress import CURSORS
from trackopt.rundir.directory import atomic_write, read_identity
from trackopt.utils.mlflow_uri import redact_credentials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from trackopt.recorder.sinks.base import Sink
    from trackopt.recorder.sinks.mlflow_artifacts import ArtifactUploader

_MAX_BACKOFF_S = 60.0  # seconds between two tries of a sink that fails


class Recorder:
    """Delivers one run. Only one recorder works on a run at a time; a second waits for the first.

    Args:
        directory: The run's directory.
        notify: Called with a line that the user should see: a sink that fails, or works again.
    """

    def __init__(self, directory: Path, notify: Callable[[str], None]) -> None:
        self._directory = directory
        self._tell = notify
        self._log = (directory / LOG).open("ab", buffering=0)
        fcntl.flock(self._log, fcntl.LOCK_EX)
        identity = read_identity(directory)
        # Relative addresses (of an SQLite file, of artifacts) are meant from where the training ran.
        try:
            os.chdir(identity["working_directory"])
        except OSError:  # the run was brought here from elsewhere
            self._tell(f"{identity['working_directory']} is gone; what is relative to it is taken to be here")
        self._names: list[str] = identity.get("sinks", [])  # it was killed before it had any
        self._journal = directory / journal.NAME
        self._deliveries: dict[str, Delivery | ArtifactUploader] = {}
        self._backoff: dict[str, tuple[float, float]] = {}  # until when, and how long, a failing sink is left alone
        self._cursors = self._load()
        self._saving = threading.Lock()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for delivery in self._deliveries.values():
            delivery.close()
        self._log.close()

    def deliver(self) -> bool:
        """Send each sink the next of what is new for it; whether there is more.

        A sink that fails is told once, and left alone for a while.
        """
        size = self._journal.stat().st_size
        more = [
            self._try(name, lambda delivery: delivery.deliver(size))
            for name in self._names
            if time.monotonic() >= self._backoff.get(name, (0.0, 0.0))[0]
        ]
        self._save()
        return any(more)

    def drain(self, on_progress: Callable[[], None] = lambda: None, *, timeout: float = 0.0) -> list[str]:
        """Send what is left, and how the run ended; the names of the sinks that still lack something.

        Args:
            on_progress: Called now and then, when there is some progress.
            timeout: For how many seconds a sink that fails is tried again.
        """
        size = self._journal.stat().st_size
        until = time.monotonic() + timeout
        left = self._names
        while True:
            left = [name for name in left if not self._flush_sink(name, size, on_progress)]
            now = time.monotonic()
            due = min((self._backoff[name][0] for name in left), default=until)
            if due >= until:
                return left
            time.sleep(max(0.0, due - now))

    def _flush_sink(self, name: str, size: int, on_progress: Callable[[], None]) -> bool:
        """Send a sink what is left of the journal's first ``size`` bytes, and the end; whether it has it all."""

        def rest(delivery: Delivery | ArtifactUploader) -> bool:
            more = bool(delivery.deliver(size))
            if not more:
                delivery.finish()
            return more

        while self._try(name, rest):
            self._save()
            on_progress()
        self._save()
        return name not in self._backoff

    def _try(self, name: str, action: Callable[[Delivery | ArtifactUploader], bool | None]) -> bool:
        try:
            more = action(self._delivery(name))
        except Exception as error:  # noqa: BLE001 - whatever one sink raises must not keep the others from theirs
            with contextlib.suppress(OSError):  # the disk may be what is full
                self._log.write(redact_credentials(traceback.format_exc()).encode())
            if name not in self._backoff:
                self._tell(
                    f"the {name} sink fails ({_first_line(error)}); training goes on, the journal keeps everything, "
                    f"`trackopt sync {self._directory}` delivers later"
                )
            pause = min(2 * self._backoff.get(name, (0.0, 0.5))[1], _MAX_BACKOFF_S)
            self._backoff[name] = (time.monotonic() + pause, pause)
            return False
        if more is not None and name in self._backoff:
            del self._backoff[name]
            self._tell(f"the {name} sink works again")
        return bool(more)

    def _delivery(self, name: str) -> Delivery | ArtifactUploader:
        if name not in self._deliveries and name == "artifacts":
            _set_mlflow_timeouts()
            from trackopt.recorder.sinks.mlflow_artifacts import ArtifactUploader

            self._deliveries[name] = ArtifactUploader(self._directory, self._cursors.get(name), self._tell, self._save)
        elif name not in self._deliveries:
            connect = _connector(name, self._directory)
            self._deliveries[name] = Delivery(self._journal, connect, self._cursors.get(name), self._tell)
        return self._deliveries[name]

    def _load(self) -> dict[str, Any]:
        try:
            cursors = orjson.loads((self._directory / CURSORS).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return dict(cursors)

    def _save(self) -> None:
        """Keep the cursors. Where that fails, what they stand for will be sent once more, which changes nothing."""
        with self._saving:  # uploads save theirs at once
            cursors = self._cursors | {name: delivery.cursor for name, delivery in self._deliveries.items()}
            if cursors != self._cursors:
                with contextlib.suppress(RunError):
                    atomic_write(self._directory / CURSORS, orjson.dumps(cursors))
                    self._cursors = cursors


def _connector(name: str, directory: Path) -> Callable[[int], Sink]:
    """A backend is imported when its sink is first made, so that the one that is missing does not stop the other."""
    if name == "tensorboard":
        from trackopt.recorder.sinks.tensorboard import TensorBoardSink

        return lambda step: TensorBoardSink(directory, step)
    if name == "mlflow":
        _set_mlflow_timeouts()
        from trackopt.recorder.sinks.mlflow import MLflowSink

        return lambda _: MLflowSink(directory)
    raise TrackoptError(f"{name}: no such sink; choose tensorboard or mlflow")


def _set_mlflow_timeouts() -> None:
    """The recorder has a back-off of its own: MLflow's would keep it for minutes at a server that is down.

    One retry is for a connection that the server had closed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it belongs to the result of `trackopt sync`


def _first_line(error: Exception) -> str:
    return redact_credentials((str(error).strip() or type(error).__name__).splitlines()[0])
