"""The training process's end of the recorder: start it, hear from it, start it anew when it dies, wait for it."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt.recorder.progress import delivered_fraction, progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG = "recorder.log"
_POLL_INTERVAL_S = 1.0  # seconds between two looks at what the recorder has to say, and whether it lives
_WAIT_INTERVAL_S = 0.2  # seconds between two looks at how far it is, while it is waited for
_NOTICE_AFTER_S = 10.0  # seconds of waiting after which it is told what is waited for
_STABLE_AFTER_S = 60.0  # seconds that a recorder lives which does not die at once
_MAX_RESTARTS = 5  # of recorders that die at once, one after the other: then none is started until the end
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of libraries that start one for each core


class RecorderProcess:
    """A running ``python -m trackopt.recorder DIR``, and the next one where it dies before its work is done.

    One socket joins the two: the recorder reads its end of file when the training process ends, however it ends,
    and writes a line when the user should know something.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._log = directory / LOG
        self._receive_buffer = b""
        self._deaths = 0
        self._told = False
        self._next = time.monotonic()
        self._start()
        # A forked data worker would keep the socket open after its parent was killed.
        os.register_at_fork(after_in_child=self._close_socket)

    def messages(self) -> list[str]:
        """What the recorder said since the last call, and whether it died; that is looked at once a second."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + _POLL_INTERVAL_S
        return [*self._read_messages(), *self._maybe_restart(now)]

    def finish(self, *, wait: bool) -> Iterator[str]:
        """Tell the recorder that nothing more comes; its last messages, as they come.

        One that is dead, or dies while it delivers the rest, is started once more.

        Args:
            wait: Whether to wait until it has delivered; a terminal shows how far it is, and Ctrl-C ends the waiting.
                It goes on in any case, if it is let.
        """
        for dead in (self._ended(), True):
            if dead:
                yield from self._report_exit()
                self._close_socket()
                self._start()
            yield from self._shutdown(wait=wait)
            if not self._ended() or self._succeeded():
                break
        else:
            yield f"{self._exit_message()}; `trackopt sync {self._log.parent}` delivers what is missing"
        self._close_socket()

    def _start(self) -> None:
        self._started_at, self._due = time.monotonic(), math.inf
        self._process: subprocess.Popen[bytes] | None = None
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        try:
            with theirs, self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trackopt.recorder", str(self._log.parent)],
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=log,
                    env=_environment(),
                )
        except OSError as error:  # no memory, no processes: as if it had died at once
            self._spawn_error = error.strerror

    def _close_socket(self) -> None:
        self._socket.close()

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _succeeded(self) -> bool:
        return self._process is not None and self._process.poll() == 0

    def _exit_message(self) -> str:
        if self._process is None:
            return f"the recorder cannot be started ({self._spawn_error})"
        return f"the recorder ended with code {self._process.returncode} (see {self._log})"

    def _maybe_restart(self, now: float) -> Iterator[str]:
        """Start a recorder that has died anew, each time after a longer pause; one that keeps dying is left."""
        if self._due < math.inf:
            if now >= self._due:
                self._close_socket()
                self._start()
        elif self._deaths < _MAX_RESTARTS and self._ended():
            self._deaths = self._deaths + 1 if now - self._started_at < _STABLE_AFTER_S else 1
            if self._deaths < _MAX_RESTARTS:
                self._due = now + 2 ** (self._deaths - 1)
                yield from self._report_exit()
            else:
                yield (
                    f"{self._exit_message()}, as did those before it: none is started until the end; training goes on, the "
                    f"journal keeps everything, `trackopt sync {self._log.parent}` delivers later"
                )

    def _report_exit(self) -> Iterator[str]:
        if not self._told:
            self._told = True
            yield f"{self._exit_message()}; it is started anew, and nothing is lost"

    def _read_messages(self) -> list[str]:
        with contextlib.suppress(OSError):  # nothing more to read, or the recorder is gone
            while data := self._socket.recv(65536):
                self._receive_buffer += data
        *lines, self._receive_buffer = self._receive_buffer.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def _shutdown(self, *, wait: bool) -> Iterator[str]:
        """Let the recorder deliver the rest and end, and say what it says meanwhile."""
        with contextlib.suppress(OSError):  # it is dead
            self._socket.shutdown(socket.SHUT_WR)
        if (process := self._process) is None:
            return
        try:
            if wait:
                yield from self._wait(process)
        except KeyboardInterrupt:
            yield f"the recorder goes on delivering in the background (process {process.pid})"
        yield from self._read_messages()
        if process.poll() is None:  # it becomes no zombie when it ends
            waiting = threading.Thread(target=process.wait, name="trackopt-recorder", daemon=True)
            with contextlib.suppress(RuntimeError):  # nor where python ends, and starts no thread any more
                waiting.start()

    def _wait(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        begin, told = time.monotonic(), False
        with progress_bar(self._log.parent) as show:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_WAIT_INTERVAL_S)
                    return
                show()
                yield from self._read_messages()
                if not told and time.monotonic() - begin > _NOTICE_AFTER_S:
                    told = True
                    yield (
                        f"waiting until everything is delivered ({delivered_fraction(self._log.parent):.0%} is); "
                        "Ctrl-C leaves the rest to the background"
                    )


def _environment() -> dict[str, str]:
    """The recorder's: it needs one thread, and must find this very trackopt, also where it runs from a checkout."""
    environment = os.environ | dict.fromkeys(_THREADS, "1")
    home = Path(__file__).resolve().parents[2]
    if "site-packages" not in home.parts:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    return environment
