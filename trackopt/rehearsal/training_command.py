"""One training from its first start to its end, in processes of its own, however often it is killed on the way."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import TrackoptError
from trackopt.rehearsal import trace
from trackopt.rundir.environment import KILLED, ResumeCheckPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from trackopt.rehearsal.trace import Trace

_EVERY = 0.1  # seconds between two looks at how far it is
_LAST_LINES = 12
OBSERVER = "trackopt.rehearsal.probe:Probe"


class CommandError(TrackoptError):
    """A command that cannot be rehearsed, or failed.

    Attributes:
        output_tail: The last lines that it wrote.
    """

    def __init__(self, message: str, said: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.output_tail = tuple(said)


class TrainingCommand:
    """A training command with a directory of its own.

    Args:
        command: Program and arguments; it runs in the current directory.
        work_dir: Where its runs go, and what it prints; it must not exist yet.
        tell: Told the steps that are done.

    Attributes:
        root: The runs are below it.
        traces: Each run by its name, in the order in which they began; empty before ``read``.
        seconds: That the command has run.
    """

    def __init__(self, command: Sequence[str], work_dir: Path, tell: Callable[[int], None]) -> None:
        self._command = list(command)
        self._home = work_dir
        self._tell = tell
        self._killed: Mapping[str, int] = {}
        self.root = work_dir / "runs"
        self.root.mkdir(parents=True)
        self.traces: dict[str, Trace] = {}
        self.seconds = 0.0

    def start(self, kill: Mapping[str, int] | None = None) -> bool:
        """Start the command, and wait until it ends or is killed; whether it was killed as planned.

        Args:
            kill: The step after which to kill it, by the run's name; by default it is left alone.

        Raises:
            CommandError: It failed.
        """
        plan = ResumeCheckPlan(self.root, kill or {}, OBSERVER)
        mark = self.root / KILLED
        mark.unlink(missing_ok=True)
        began = time.monotonic()
        code = self._run({**os.environ, **plan.environment()})
        self.seconds += time.monotonic() - began
        if mark.exists():
            self._killed = plan.kill
            return True
        if code:
            after = "".join(f", started again after the kill at step {step:,}," for step in self._killed.values())
            raise CommandError(f"{shlex.join(self._command)}{after} {_ending(code)}", self._said())
        return False

    def read(self) -> None:
        """Read what the runs wrote."""
        found = [trace.read(file.parent) for file in self.root.glob(f"*/{trace.NAME}")]
        self.traces = {one.name: one for one in sorted(found, key=lambda one: one.started_at)}

    def runs_in_order(self) -> list[tuple[str, int]]:
        """Run and step of every record, in the order in which they were made."""
        lines = [
            (line.time, run, line.step)
            for run, one in self.traces.items()
            for line in journal.read(self.root / run / journal.NAME)
            if line.step in one.steps and line.event is None
        ]
        return list(dict.fromkeys((run, step) for _, run, step in sorted(lines)))

    def _run(self, environment: dict[str, str]) -> int:
        with (self._home / "stdout.txt").open("ab") as out, (self._home / "stderr.txt").open("ab") as err:
            try:
                process = subprocess.Popen(
                    self._command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandError(f"{self._command[0]}: cannot be run ({error.strerror})") from error
            try:
                return self._wait(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it left behind; after Ctrl-C all of it
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        seen: dict[Path, tuple[int, int]] = {}  # of each journal: how far it is read, and its latest step
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_EVERY)
            for file in self.root.glob(f"*/{journal.NAME}"):
                for line in journal.read(file, seen.get(file, (0, 0))[0]):
                    seen[file] = (line.end_offset, line.step)
            self._tell(sum(step for _, step in seen.values()))

    def _said(self) -> list[str]:
        for name in ("stderr.txt", "stdout.txt"):
            if lines := (self._home / name).read_text(errors="replace").strip().splitlines():
                return lines[-_LAST_LINES:]
        return []


def _ending(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
