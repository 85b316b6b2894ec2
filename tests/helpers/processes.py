"""Scripts in processes of their own, also on a terminal."""

from __future__ import annotations

import contextlib
import functools
import os
import pty
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.forked import RECORDERS, Forked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TextIO

ROOT = Path(__file__).parents[2]
_LOCK = threading.Lock()
_STACK = contextlib.ExitStack()


class Script(Forked):
    """A script that runs as ``python SCRIPT …`` would, forked from a process with torch loaded; as `subprocess.Popen`.

    Args:
        script: The file.
        arguments: Of the command line.
        environment: Variables beside those of this process.
        streams: The descriptors of its stdin, stdout and stderr.
    """

    stdin: TextIO | None = None
    stdout: TextIO | None = None
    stderr: TextIO | None = None

    def __init__(
        self, script: Path, arguments: Iterable[object], environment: Mapping[str, str], streams: Sequence[int]
    ) -> None:
        with _LOCK:
            servers = {name: _server(name) for name in ("scripts", "recorders")}
        request = {
            "script": str(script),
            "arguments": [*map(str, arguments)],
            "environment": {RECORDERS: servers["recorders"], **os.environ, **environment},
            "directory": str(Path.cwd()),
        }
        super().__init__(servers["scripts"], request, streams)

    def __del__(self) -> None:
        super().__del__()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def communicate(self, words: str = "", timeout: float = 60) -> tuple[str, str]:
        """Write to its stdin and wait for its end; what it wrote to the pipes of `start_script`, to their ends."""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self.stdin.write(words)
            self.stdin.close()
        with ThreadPoolExecutor() as pool:
            streams = (self.stdout, self.stderr)
            written = [None if stream.closed else pool.submit(stream.read) for stream in streams]
            output, errors = ("" if found is None else found.result(timeout) for found in written)
        self.stdout.close()
        self.stderr.close()
        self.wait()
        return output, errors


def run_script(script: Path, *arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run a python script in a process of its own; it ends by itself or kills itself."""
    variables = {key: str(value) for key, value in environment.items()}
    with tempfile.TemporaryFile() as nothing, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Script(script, arguments, variables, [nothing.fileno(), out.fileno(), err.fileno()]).wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([sys.executable, str(script), *arguments], code, out.read(), err.read())


def start_script(script: Path, *arguments: object, **environment: str) -> Script:
    """Start a python script in a process of its own, with pipes as its streams."""
    (reader, stdin), (stdout, writer), (stderr, errors) = (os.pipe() for _ in range(3))
    process = Script(script, arguments, environment, [reader, writer, errors])
    for descriptor in (reader, writer, errors):
        os.close(descriptor)
    process.stdin, process.stdout, process.stderr = os.fdopen(stdin, "w"), os.fdopen(stdout), os.fdopen(stderr)
    return process


@functools.cache
def _server(name: str) -> str:
    """Start a process that forks, for this test process; return the path of its socket."""
    # A socket's path has at most 107 characters, which a temporary directory elsewhere may exceed by itself.
    folder = _STACK.enter_context(tempfile.TemporaryDirectory(prefix="trackopt-tests-", dir="/tmp"))
    path = f"{folder}/socket"
    process = _STACK.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forkserver", path, name],
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
    """End the processes that fork, where they were started."""
    _STACK.close()


def run_in_pty(script: Path, *arguments: object, react: Any = lambda seen, process: None, **environment: str) -> Any:
    """Run a script with its standard error on a terminal, its standard output not; both, and the exit code.

    ``react`` is called, whenever something appears there, with all that has and the process.
    """
    main, side = pty.openpty()
    with tempfile.TemporaryFile() as nothing, tempfile.TemporaryFile("w+") as out:
        process = Script(script, arguments, environment, [nothing.fileno(), out.fileno(), side])
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
