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

from trackopt.recorder.progress import bar, share

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG = "recorder.log"
_EVERY = 1.0  # seconds between two looks at what the recorder has to say, and whether it lives
_GLANCE = 0.2  # seconds between two looks at how far it is, while it is waited for
_PATIENCE = 10.0  # seconds of waiting after which it is told what is waited for
_STEADY = 60.0  # seconds that a recorder lives which does not die at once
_DEATHS = 5  # of recorders that die at once, one after the other: then none is started until the end
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
        self._heard = b""
        self._deaths = 0
        self._told = False
        self._next = time.monotonic()
        self._start()
        # A forked data worker would keep the socket open after its parent was killed.
        os.register_at_fork(after_in_child=self._let_go)

    def messages(self) -> list[str]:
        """What the recorder said since the last call, and whether it died; that is looked at once a second."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + _EVERY
        return [*self._listen(), *self._revive(now)]

    def finish(self, *, wait: bool) -> Iterator[str]:
        """Tell the recorder that nothing more comes; its last messages, as they come.

        One that is dead, or dies while it delivers the rest, is started once more.

        Args:
            wait: Whether to wait until it has delivered; a terminal shows how far it is, and Ctrl-C ends the waiting.
                It goes on in any case, if it is let.
        """
        for dead in (self._ended(), True):
            if dead:
                yield from self._tell_death()
                self._let_go()
                self._start()
            yield from self._last_words(wait=wait)
            if not self._ended() or self._succeeded():
                break
        else:
            yield f"{self._death()}; `trackopt sync {self._log.parent}` delivers what is missing"
        self._let_go()

    def _start(self) -> None:
        self._born, self._due = time.monotonic(), math.inf
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
            self._obstacle = error.strerror

    def _let_go(self) -> None:
        self._socket.close()

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _succeeded(self) -> bool:
        return self._process is not None and self._process.poll() == 0

    def _death(self) -> str:
        if self._process is None:
            return f"the recorder cannot be started ({self._obstacle})"
        return f"the recorder ended with code {self._process.returncode} (see {self._log})"

    def _revive(self, now: float) -> Iterator[str]:
        """Start a recorder that has died anew, each time after a longer pause; one that keeps dying is left."""
        if self._due < math.inf:
            if now >= self._due:
                self._let_go()
                self._start()
        elif self._deaths < _DEATHS and self._ended():
            self._deaths = self._deaths + 1 if now - self._born < _STEADY else 1
            if self._deaths < _DEATHS:
                self._due = now + 2 ** (self._deaths - 1)
                yield from self._tell_death()
            else:
                yield (
                    f"{self._death()}, as did those before it: none is started until the end; training goes on, the "
                    f"journal keeps everything, `trackopt sync {self._log.parent}` delivers later"
                )

    def _tell_death(self) -> Iterator[str]:
        if not self._told:
            self._told = True
            yield f"{self._death()}; it is started anew, and nothing is lost"

    def _listen(self) -> list[str]:
        with contextlib.suppress(OSError):  # nothing more to read, or the recorder is gone
            while data := self._socket.recv(65536):
                self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def _last_words(self, *, wait: bool) -> Iterator[str]:
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
        yield from self._listen()
        if process.poll() is None:  # it becomes no zombie when it ends
            waiting = threading.Thread(target=process.wait, name="trackopt-recorder", daemon=True)
            with contextlib.suppress(RuntimeError):  # nor where python ends, and starts no thread any more
                waiting.start()

    def _wait(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        begin, told = time.monotonic(), False
        with bar(self._log.parent) as show:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GLANCE)
                    return
                show()
                yield from self._listen()
                if not told and time.monotonic() - begin > _PATIENCE:
                    told = True
                    yield (
                        f"waiting until everything is delivered ({share(self._log.parent):.0%} is); "
                        "Ctrl-C leaves the rest to the background"
                    )


def _environment() -> dict[str, str]:
    """The recorder's: it needs one thread, and must find this very trackopt, also where it runs from a checkout."""
    environment = os.environ | dict.fromkeys(_THREADS, "1")
    home = Path(__file__).resolve().parents[2]
    if "site-packages" not in home.parts:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    return environment
