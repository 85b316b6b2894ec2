"""One training from its first start to its end, in its own processes, through any number of kills."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
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

_POLL_INTERVAL_S = 0.1
_TAIL_LINES = 12
OBSERVER = "trackopt.rehearsal.probe:Probe"


class CommandError(TrackoptError):
    """A command failed or cannot be rehearsed.

    Attributes:
        output_tail: The last lines of its output.
    """

    def __init__(self, message: str, output_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.output_tail = tuple(output_tail)


class TrainingCommand:
    """A training command with a directory of its own.

    Args:
        command: Program and arguments; it runs in the current directory.
        work_dir: The directory of its runs and its output; it must not exist yet.
        on_progress: Called with the number of completed steps.

    Attributes:
        root: The directory that holds the runs.
        traces: Each run by its name, in the order in which they began; empty before ``read``.
        seconds: How long the command has run.
    """

    def __init__(self, command: Sequence[str], work_dir: Path, on_progress: Callable[[int], None]) -> None:
        self._command = list(command)
        self._work_dir = work_dir
        self._on_progress = on_progress
        self._latest_kill: Mapping[str, int] = {}
        self.root = work_dir / "runs"
        self.root.mkdir(parents=True)
        self.traces: dict[str, Trace] = {}
        self.seconds = 0.0

    def start(self, kill: Mapping[str, int] | None = None) -> bool:
        """Run the command until it ends or is killed; return True if it was killed as planned.

        Args:
            kill: The step after which to kill it, by the run's name. Default: not at all.

        Raises:
            CommandError: It failed.
        """
        plan = ResumeCheckPlan(self.root, kill or {}, OBSERVER)
        mark = self.root / KILLED
        mark.unlink(missing_ok=True)
        started_at = time.monotonic()
        code = self._run({**os.environ, **plan.environment()})
        self.seconds += time.monotonic() - started_at
        if mark.exists():
            self._latest_kill = plan.kill
            return True
        if code:
            after = "".join(f", started again after the kill at step {step:,}," for step in self._latest_kill.values())
            raise CommandError(f"{shlex.join(self._command)}{after} {_describe_exit(code)}", self._read_output_tail())
        return False

    def read(self) -> None:
        """Read the traces of the runs."""
        traces = [trace.read(file.parent) for file in self.root.glob(f"*/{trace.NAME}")]
        self.traces = {each.name: each for each in sorted(traces, key=lambda each: each.started_at)}

    def runs_in_order(self) -> list[tuple[str, int]]:
        """List run and step of every record, in chronological order."""
        lines = [
            (line.time, run, line.step)
            for run, run_trace in self.traces.items()
            for line in journal.read(self.root / run / journal.NAME)
            if line.step in run_trace.steps and line.event is None
        ]
        return list(dict.fromkeys((run, step) for _, run, step in sorted(lines)))

    def _run(self, environment: dict[str, str]) -> int:
        if sys.platform == "win32":
            raise CommandError("rehearse kills process groups, which Windows does not have; use it on Linux or macOS")
        with (self._work_dir / "stdout.txt").open("ab") as out, (self._work_dir / "stderr.txt").open("ab") as err:
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
                    os.killpg(process.pid, signal.SIGKILL)  # processes that it left running; after Ctrl-C all of them
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        seen: dict[Path, tuple[int, int]] = {}  # by journal: the offset already read, and the latest step
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_INTERVAL_S)
            for file in self.root.glob(f"*/{journal.NAME}"):
                for line in journal.read(file, seen.get(file, (0, 0))[0]):
                    seen[file] = (line.end_offset, line.step)
            self._on_progress(sum(step for _, step in seen.values()))

    def _read_output_tail(self) -> list[str]:
        for name in ("stderr.txt", "stdout.txt"):
            if lines := (self._work_dir / name).read_text(encoding="utf-8", errors="replace").strip().splitlines():
                return lines[-_TAIL_LINES:]
        return []


def _describe_exit(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
