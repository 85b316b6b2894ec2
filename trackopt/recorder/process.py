"""The training process's end of the recorder: start it, hear from it, and wait for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from trackopt.recorder.progress import bar

LOG = "recorder.log"
_EVERY = 1.0  # seconds between two looks at what the recorder has to say
_GLANCE = 0.2  # seconds between two looks at how far it is, while it is waited for
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of libraries that start one for each core


class RecorderProcess:
    """A running ``python -m trackopt.recorder DIR``.

    One socket joins the two: the recorder reads its end of file when the training process ends, however it ends,
    and writes a line when the user should know something.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._heard = b""
        self._next = time.monotonic()
        self._log = directory / LOG
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trackopt.recorder", str(directory)],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env=_environment(),
            )
        # A forked data worker would keep the socket open after its parent was killed.
        os.register_at_fork(after_in_child=self._socket.close)

    def messages(self, *, now: bool = False) -> list[str]:
        """What the recorder said since the last call; it is looked at once a second, or ``now``."""
        if not now and time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + _EVERY
        try:
            while data := self._socket.recv(65536):
                self._heard += data
        except OSError:  # nothing more to read, or the recorder is gone
            pass
        *lines, self._heard = self._heard.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def finish(self, *, wait: bool) -> list[str]:
        """Tell the recorder that nothing more comes; its last messages.

        Args:
            wait: Whether to wait until it has delivered; a terminal shows how far it is, and Ctrl-C ends the waiting.
                It goes on in any case, if it is let.
        """
        self._socket.shutdown(socket.SHUT_WR)
        code = self._process.poll()
        interrupted = []
        if wait:
            try:
                code = self._wait()
            except KeyboardInterrupt:
                interrupted = [f"the recorder goes on delivering in the background (process {self._process.pid})"]
        if code is None:  # it becomes no zombie when it ends
            threading.Thread(target=self._process.wait, name="trackopt-recorder", daemon=True).start()
        messages = self.messages(now=True) + interrupted
        self._socket.close()
        if code:
            messages.append(
                f"the recorder ended with code {code} (see {self._log}); `trackopt sync {self._log.parent}` delivers "
                "what is missing"
            )
        return messages

    def _wait(self) -> int:
        with bar(self._log.parent) as show:
            while True:
                try:
                    return self._process.wait(_GLANCE)
                except subprocess.TimeoutExpired:
                    show()


def _environment() -> dict[str, str]:
    """The recorder's: it needs one thread, and must find this very trackopt, also where it runs from a checkout."""
    environment = os.environ | dict.fromkeys(_THREADS, "1")
    home = Path(__file__).resolve().parents[2]
    if "site-packages" not in home.parts:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    return environment
