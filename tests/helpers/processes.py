"""Scripts in processes of their own, also on a terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import select
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TextIO

ROOT = Path(__file__).parents[2]
_LOCK = threading.Lock()
_STACK = contextlib.ExitStack()


class Script:
    """A script that runs as ``python SCRIPT …`` would, forked from a process with torch loaded; as `subprocess.Popen`.

    Args:
        script: The file.
        arguments: Of the command line.
        environment: Variables beside those of this process.
        stdout: Where its output goes.
        stderr: Where its errors go.
    """

    stdout: TextIO | None = None
    stderr: TextIO | None = None

    def __init__(
        self, script: Path, arguments: tuple[object, ...], environment: dict[str, str], stdout: int, stderr: int
    ) -> None:
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        with _LOCK:
            self._connection.connect(_server())
        request = {
            "script": str(script),
            "arguments": [*map(str, arguments)],
            "environment": {**os.environ, **environment},
            "directory": str(Path.cwd()),
        }
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [line], [stdout, stderr])
        self._connection.sendall(line[sent:])
        self.pid = int(self._receive())

    def __del__(self) -> None:
        self._connection.close()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def _receive(self) -> bytes:
        """Return the next line of the answers, and take nothing after it, so that `poll` sees whether there is more."""
        line = b""
        while not line.endswith(b"\n"):
            received = self._connection.recv(1)
            if not received:
                raise RuntimeError("the process that forks the scripts has ended")
            line += received
        return line

    def wait(self) -> int:
        """Wait for its end; the exit code, or the negative number of the signal."""
        if self.returncode is None:
            self.returncode = int(self._receive())
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for its end; what it wrote to the pipes of `start_script`, to their ends."""
        with ThreadPoolExecutor() as pool:
            streams = (self.stdout, self.stderr)
            written = [None if stream.closed else pool.submit(stream.read) for stream in streams]
            output, errors = ("" if found is None else found.result(timeout) for found in written)
        self.stdout.close()
        self.stderr.close()
        self.wait()
        return output, errors

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        os.kill(self.pid, number)


def run_script(script: Path, *arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run a python script in a process of its own; it ends by itself or kills itself."""
    variables = {key: str(value) for key, value in environment.items()}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Script(script, arguments, variables, out.fileno(), err.fileno()).wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([sys.executable, str(script), *arguments], code, out.read(), err.read())


def start_script(script: Path, *arguments: object) -> Script:
    """Start a python script in a process of its own, with pipes as ``stdout`` and ``stderr``."""
    pipes = [os.pipe() for _ in range(2)]
    process = Script(script, arguments, {}, *(writer for _, writer in pipes))
    for _, writer in pipes:
        os.close(writer)
    process.stdout, process.stderr = (os.fdopen(reader) for reader, _ in pipes)
    return process


@functools.cache
def _server() -> str:
    """Start the process that forks, for this test process; return the path of its socket."""
    # A socket's path has at most 107 characters, which a temporary directory elsewhere may exceed by itself.
    folder = _STACK.enter_context(tempfile.TemporaryDirectory(prefix="trackopt-tests-", dir="/tmp"))
    path = f"{folder}/socket"
    process = _STACK.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forkserver", path],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )
    assert process.stdout.readline() == "ready\n"
    return path


def stop_server() -> None:
    """End the process that forks, where it was started."""
    _STACK.close()


def run_in_pty(script: Path, *arguments: object, react: Any = lambda seen, process: None, **environment: str) -> Any:
    """Run a script with its standard error on a terminal, its standard output not; both, and the exit code.

    ``react`` is called, whenever something appears there, with all that has and the process.
    """
    main, side = pty.openpty()
    with tempfile.TemporaryFile("w+") as out:
        process = Script(script, arguments, environment, out.fileno(), side)
        os.close(side)
        seen = b""
        while True:
            try:
                seen += os.read(main, 65536)
            except OSError:  # the other side is closed
                break
            react(seen, process)
        os.close(main)
        code = process.wait()
        out.seek(0)
        return out.read(), seen.decode(), code
