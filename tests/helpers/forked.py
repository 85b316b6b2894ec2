"""Processes that a fork server starts: the client's side of `forkserver`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: In a script's environment: the socket of the server that forks recorders. Without it they are started as usual.
RECORDERS = "TRACKOPT_TEST_RECORDERS"


class Forked:
    """A python process that a server forked; as `subprocess.Popen`.

    Args:
        server: The path of the server's socket.
        request: What to run: ``script`` or ``module``, ``arguments``, ``environment`` and ``directory``.
        streams: The descriptors of its stdin, stdout and stderr.
    """

    def __init__(self, server: str, request: Mapping[str, Any], streams: Sequence[int]) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server)
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [line], streams)
        self._connection.sendall(line[sent:])
        self.pid = int(self._receive())

    def __del__(self) -> None:
        self._connection.close()

    def _receive(self) -> bytes:
        """Return the next line of the answers, and take nothing after it, so that `poll` sees whether there is more."""
        line = b""
        while not line.endswith(b"\n"):
            received = self._connection.recv(1)
            if not received:
                raise RuntimeError("the process that forks the scripts has ended")
            line += received
        return line

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code, or the negative number of the signal."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._connection], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
                self.returncode = int(self._receive())
                self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it runs."""
        if not self._lock.locked():  # or a thread waits
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_recorder(command: Sequence[str], *, stderr: Any, env: Mapping[str, str], **options: Any) -> Any:
    """Start a recorder where `subprocess.Popen` would, with two pipes: fork it, or start it in earnest."""
    server = os.environ.get(RECORDERS)
    if not server:
        return subprocess.Popen(command, stderr=stderr, env=env, **options)
    _, _, module, *arguments = command
    request = {"module": module, "arguments": arguments, "environment": dict(env), "directory": str(os.getcwd())}  # noqa: PTH109
    (stdin, to_recorder), (from_recorder, stdout) = os.pipe(), os.pipe()
    recorder: Any = Forked(server, request, [stdin, stdout, stderr.fileno()])
    os.close(stdin)
    os.close(stdout)
    recorder.stdin, recorder.stdout = os.fdopen(to_recorder, "wb", 0), os.fdopen(from_recorder, "rb", 0)
    return recorder
