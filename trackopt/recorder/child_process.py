"""The training process's side of the recorder: start it, read its messages, restart it, wait for it."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from trackopt.errors import TrackoptError
from trackopt.recorder.progress import OutstandingDelivery, progress_bar
from trackopt.recorder.starvation import StarvationMonitor, release_memory
from trackopt.rundir.identity import read_identity
from trackopt.utils.lock import lock_holder, try_lock
from trackopt.utils.mlflow_uri import sqlite_file, tracking_uri, upgrade_lock_file

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG_NAME = "recorder.log"
NORMAL_PRIORITY = "--normal-priority"
_POLL_INTERVAL_S = 1.0
_WAIT_INTERVAL_S = 0.2
_NOTICE_AFTER_S = 10.0
_STABLE_AFTER_S = 60.0  # a recorder that exits sooner counts as an early exit
_MAX_EARLY_EXITS = 5  # consecutive ones, after which no recorder is started until the run closes
_RECEIVE_BYTES = 1 << 16
if sys.platform == "win32":
    _CREATION_FLAGS = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    _LOW_PRIORITY_FLAGS = subprocess.IDLE_PRIORITY_CLASS
else:
    _CREATION_FLAGS = _LOW_PRIORITY_FLAGS = 0  # the recorder does it itself
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # default: a thread per core


class RecorderProcess:
    """A running ``python -m trackopt.recorder DIR``, restarted if it exits early.

    Two pipes connect the two processes. The recorder reads the end of its standard input when the training process
    exits, in whatever way, and writes messages for the user to its standard output, one per line.

    It runs only when a processor is idle, and cannot raise its priority again without privileges. So where the end of
    the run waits for a recorder that gets no processor, another one of normal priority takes its place.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log_path = directory / LOG_NAME
        self._receive_buffer = b""
        self._early_exits = 0
        self._exit_reported = False
        self._next_poll = time.monotonic()
        self._start()
        if sys.platform != "win32":
            # A forked data worker would keep the pipe open after its parent was killed.
            os.register_at_fork(after_in_child=self._close_pipes)

    def poll_messages(self) -> list[str]:
        """Return the recorder's new messages, at most once a second, and restart it if it has exited."""
        now = time.monotonic()
        if now < self._next_poll:
            return []
        self._next_poll = now + _POLL_INTERVAL_S
        return [*self._read_messages(), *self._maybe_restart(now)]

    def finish(self, *, wait: bool) -> Iterator[str]:
        """Let the recorder deliver the rest and exit; yield its last messages.

        A recorder that has exited, or exits with an error meanwhile, is restarted once.

        Args:
            wait: Wait until everything is delivered, with a progress bar on a terminal. Ctrl-C ends the waiting; the
                recorder then continues in the background, as it does without ``wait``.
        """
        for restart in (self._has_exited(), True):
            if restart:
                yield from self._report_exit()
                self._close_pipes()
                self._start()
            yield from self._shutdown(wait=wait)
            if not self._has_exited() or self._has_succeeded():
                break
        else:
            yield f"{self._exit_message()}; to deliver the missing records, run `trackopt sync {self._directory}`"
        self._close_pipes()

    def _start(self, *, low_priority: bool = True) -> None:
        self._started_at, self._restart_at = time.monotonic(), math.inf
        self._process: subprocess.Popen[bytes] | None = None
        options = [] if low_priority else [NORMAL_PRIORITY]
        try:
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trackopt.recorder", str(self._directory), *options],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_make_environment(),
                    creationflags=_CREATION_FLAGS | (_LOW_PRIORITY_FLAGS if low_priority else 0),
                )
        except OSError as error:  # out of memory or processes: handled like an early exit
            self._spawn_error = error.strerror

    def _close_pipes(self) -> None:
        if self._process is not None:
            _close_pipes(self._process)

    def _has_exited(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _has_succeeded(self) -> bool:
        return self._process is not None and self._process.poll() == 0

    def _exit_message(self) -> str:
        if self._process is None:
            return f"the recorder cannot be started ({self._spawn_error})"
        return f"the recorder exited with code {self._process.returncode} (see {self._log_path})"

    def _maybe_restart(self, now: float) -> Iterator[str]:
        """Restart a recorder that has exited, after a pause that doubles with each consecutive early exit."""
        if self._restart_at < math.inf:
            if now >= self._restart_at:
                self._close_pipes()
                self._start()
        elif self._early_exits < _MAX_EARLY_EXITS and self._has_exited():
            self._early_exits = self._early_exits + 1 if now - self._started_at < _STABLE_AFTER_S else 1
            if self._early_exits < _MAX_EARLY_EXITS:
                self._restart_at = now + 2 ** (self._early_exits - 1)
                yield from self._report_exit()
            else:
                yield (
                    f"{self._exit_message()}, {_MAX_EARLY_EXITS} times in a row; it is not restarted until the run "
                    "closes; training continues and the journal keeps all records; to deliver them later, run "
                    f"`trackopt sync {self._directory}`"
                )

    def _report_exit(self) -> Iterator[str]:
        if not self._exit_reported:
            self._exit_reported = True
            yield f"{self._exit_message()}; it is restarted, and no records are lost"

    def _read_messages(self) -> list[str]:
        if self._process is not None and self._process.stdout is not None:
            with contextlib.suppress(OSError, ValueError):  # no more messages; closed, as in a forked data worker
                while data := _read_available(self._process.stdout):
                    self._receive_buffer += data
        *lines, self._receive_buffer = self._receive_buffer.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def _shutdown(self, *, wait: bool) -> Iterator[str]:
        """Signal the end of the journal, and yield the messages until the recorder exits or the waiting ends."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            if wait:
                yield from self._wait()
        except KeyboardInterrupt:
            yield f"the recorder continues in the background (process {self._process.pid})"
        yield from self._read_messages()
        if self._process.poll() is None:
            _reap(self._process)

    def _wait(self) -> Iterator[str]:
        """Wait for the recorder to exit; replace it if it gets no processor."""
        notice_at = time.monotonic() + _NOTICE_AFTER_S
        outstanding = OutstandingDelivery(self._directory)
        starvation: StarvationMonitor | None = StarvationMonitor()
        with progress_bar(outstanding) as update:
            while self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_WAIT_INTERVAL_S)
                    return
                update()
                yield from self._read_messages()
                # A recorder that an earlier attempt left behind may still have the lock.
                pid = lock_holder(self._log_path) or self._process.pid
                if starvation is not None and starvation.is_starving(pid) and not _is_upgrading(self._directory):
                    self._replace_starving()
                    starvation = None
                if time.monotonic() > notice_at:
                    notice_at = math.inf
                    yield f"{outstanding}; press Ctrl-C to let it continue in the background"

    def _replace_starving(self) -> None:
        """Let a recorder of normal priority deliver the rest, and kill the one that gets no processor.

        The new one continues at the cursors, as after any death of a recorder. It starts first, so that one of them
        completes the delivery even if this process is killed in between.
        """
        starving = self._process
        self._start(low_priority=False)
        if self._process is None or self._process.stdin is None:
            self._process = starving
            return
        self._process.stdin.close()
        self._receive_buffer = b""
        if starving is not None:
            starving.kill()
            release_memory(starving.pid)
            _close_pipes(starving)
            _reap(starving)


def _is_upgrading(directory: Path) -> bool:
    """Return whether MLflow may be upgrading the database of a run: a kill would leave a half of its new tables."""
    with contextlib.suppress(OSError, TrackoptError):  # no database yet, no locks, no run
        database = sqlite_file(read_identity(directory).mlflow.tracking_uri)
        if database is not None:
            with upgrade_lock_file(database).open("rb") as file:
                return not try_lock(file.fileno())
    return False


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in filter(None, (process.stdin, process.stdout)):
        pipe.close()


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process in a thread, so that it leaves no zombie."""
    with contextlib.suppress(RuntimeError):  # the interpreter is exiting and starts no more threads
        threading.Thread(target=process.wait, name="trackopt-recorder", daemon=True).start()


def _read_available(pipe: IO[bytes]) -> bytes:
    """Read what a pipe holds, without waiting; nothing at its end. Raises OSError if it is empty."""
    if sys.platform == "win32":
        import _winapi
        import msvcrt

        available = _winapi.PeekNamedPipe(msvcrt.get_osfhandle(pipe.fileno()))[0]
        return os.read(pipe.fileno(), min(int(available), _RECEIVE_BYTES)) if available else b""
    os.set_blocking(pipe.fileno(), False)
    return os.read(pipe.fileno(), _RECEIVE_BYTES)


def _make_environment() -> dict[str, str]:
    """Return the recorder's environment: one thread, and this very trackopt, even if run from a checkout.

    It has the credentials in a tracking URI that the script has set, which are saved nowhere.
    """
    environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, "1") | {"MLFLOW_TRACKING_URI": tracking_uri()}
    home = Path(__file__).resolve().parents[2]
    if "site-packages" not in home.parts:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    return environment
