"""The asking side of ``server``, and strace on it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.robustness.faults.server import Case, sent

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """How a training ended, and what it had told by then.

    Attributes:
        status: Its exit status; negative is a signal.
        records: Step and loss of the records that it had written.
        checkpoint: The step of the newest checkpoint that was on the disk.
        resumed: The step that it went on from; -1 if ``wrap`` never returned.
        through: Whether it came to its end.
        digest: Of its state at the end.
        error: What trackopt raised.
        traceback: What anything else raised.
        messages: What the user was told.
    """

    status: int
    records: list[list[float]]
    checkpoint: int
    resumed: int
    through: bool
    digest: str = ""
    error: str = ""
    traceback: str = ""
    messages: list[str] = field(default_factory=list)

    @property
    def ill(self) -> str:
        """What should not be, in one line: a traceback, or a signal that nobody sent."""
        if self.traceback:
            return self.traceback.strip().splitlines()[-1]
        if self.status < 0 and self.status != -signal.SIGKILL:
            return f"ended by {signal.Signals(-self.status).name}"
        return ""


class Server:
    """A server of forks; a context manager."""

    def __init__(self) -> None:
        settings = {key: value for key, value in os.environ.items() if key != "TRACKOPT_DIR"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.robustness.faults.server"],
            env={**settings, **_ONE_THREAD, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._answer()["pid"]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, case: Case) -> Outcome:
        """Run one case to its end."""
        self._process.stdin.write(sent(case))
        self._process.stdin.flush()
        return Outcome(**self._answer())

    @contextlib.contextmanager
    def traced(self, *options: str) -> Iterator[None]:
        """With strace on it and on all its children; its counts begin anew."""
        command = ["strace", "-f", "-qq", *options, "-p", str(self.pid)]
        strace = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while f"TracerPid:\t{strace.pid}\n" not in Path(f"/proc/{self.pid}/status").read_text():
            if strace.poll() is not None:
                raise RuntimeError(f"strace: {strace.stderr.read()}")
            time.sleep(0.002)
        try:
            yield
        finally:
            strace.terminate()  # lets go of the server
            strace.communicate()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of forks ended with {self._process.wait()}")
        return json.loads(line)


@cache
def missing_tools() -> str:
    """Why strace cannot be used on this machine; empty if it can."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-qq", "-e", "inject=getppid:error=EIO", "-o", "/dev/null", "sleep", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"strace may not trace here ({done.stderr.strip()})" if done.returncode else ""
