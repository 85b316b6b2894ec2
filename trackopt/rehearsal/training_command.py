"""One training from its first start to its end, in its own processes, through any number of kills."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import TrackoptError
from trackopt.rehearsal import injection, trace, workspace
from trackopt.rundir.environment import KILLED, ResumeCheckPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trackopt.rehearsal.trace import Trace

_POLL_INTERVAL_S = 0.1
_TAIL_LINES = 12
_CHECKPOINT = "{checkpoint}"
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
        command: Program and arguments; it runs in a copy of the current directory.
        work_dir: The directory of its runs and its output; it must not exist yet.
        resume_with: What the command line gets after a kill; ``{checkpoint}`` is the newest checkpoint that it wrote.

    Attributes:
        root: The directory that holds the runs.
        traces: Each run by its name, in the order in which they began; empty before ``read``.
        seconds: How long the command has run.
    """

    def __init__(self, command: Sequence[str], work_dir: Path, resume_with: Sequence[str] = ()) -> None:
        self._command = list(command)
        self._resume_with = resume_with
        self._work_dir = work_dir
        self._latest_kill: Mapping[str, int] = {}
        self.root = work_dir / "runs"
        self.root.mkdir(parents=True)
        self._began_at = time.time()
        self._copy = workspace.copy_directory(Path.cwd(), work_dir / "copy")
        self.traces: dict[str, Trace] = {}
        self.seconds = 0.0

    def start(self, kill: Mapping[str, int] | None = None, on_progress: Callable[[int], None] = lambda _: None) -> bool:
        """Run the command until it ends or is killed; return True if it was killed as planned.

        Args:
            kill: The step after which to kill it, by the run's name. Default: not at all.
            on_progress: Called with the number of completed steps.

        Raises:
            CommandError: It failed.
        """
        plan = ResumeCheckPlan(self.root, kill or {}, OBSERVER)
        mark = self.root / KILLED
        mark.unlink(missing_ok=True)
        started_at = time.monotonic()
        variables = {**os.environ, **plan.environment()}
        command = self._command + (self._resume_arguments() if self._latest_kill else [])
        code = self._run(command, injection.prepare_environment(self._work_dir / "site", variables), on_progress)
        self.seconds += time.monotonic() - started_at
        if mark.exists():
            self._latest_kill = plan.kill
            return True
        if code:
            after = "".join(f", started again after the kill at step {step:,}," for step in self._latest_kill.values())
            raise CommandError(f"{shlex.join(command)}{after} {_describe_exit(code)}", self._read_output_tail())
        return False

    def read(self) -> None:
        """Read the traces of the runs."""
        traces = [trace.read(file.parent) for file in self.root.glob(f"*/{trace.NAME}")]
        of_runs = [each for each in traces if each.name != trace.OBSERVED] or traces
        self.traces = {each.name: each for each in sorted(of_runs, key=lambda each: each.started_at)}

    def runs_in_order(self) -> list[tuple[str, int]]:
        """List run and step of every record, in chronological order."""
        if trace.OBSERVED in self.traces:
            return [(trace.OBSERVED, step) for step in sorted(self.traces[trace.OBSERVED].steps)]
        lines = [
            (line.time, run, line.step)
            for run, run_trace in self.traces.items()
            for line in journal.read(self.root / run / journal.NAME)
            if line.step in run_trace.steps and line.event is None
        ]
        return list(dict.fromkeys((run, step) for _, run, step in sorted(lines)))

    def _resume_arguments(self) -> list[str]:
        """Return what the command line gets after a kill; nothing if it needs a checkpoint and there is none."""
        if not any(_CHECKPOINT in word for word in self._resume_with):
            return list(self._resume_with)
        checkpoint = workspace.find_newest_checkpoint(self._copy, self._began_at)
        if checkpoint is None:
            return []
        return [word.replace(_CHECKPOINT, str(checkpoint)) for word in self._resume_with]

    def _run(self, command: list[str], environment: dict[str, str], on_progress: Callable[[int], None]) -> int:
        if sys.platform == "win32":
            raise CommandError("rehearse kills process groups, which Windows does not have; use it on Linux or macOS")
        with (self._work_dir / "stdout.txt").open("ab") as out, (self._work_dir / "stderr.txt").open("ab") as err:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self._copy,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandError(f"{command[0]}: cannot be run ({error.strerror})") from error
            try:
                return self._wait(process, on_progress)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # processes that it left running; after Ctrl-C all of them
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], on_progress: Callable[[int], None]) -> int:
        seen: dict[Path, tuple[int, int]] = {}  # by journal: the offset already read, and the latest step
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_INTERVAL_S)
            for file in self.root.glob(f"*/{journal.NAME}"):
                for line in journal.read(file, seen.get(file, (0, 0))[0]):
                    seen[file] = (line.end_offset, line.step)
            observed = self.root / trace.OBSERVED / trace.NAME
            steps = sum(step for _, step in seen.values())
            if not steps and observed.exists():
                steps = trace.latest_step(observed.parent)
            on_progress(steps)

    def _read_output_tail(self) -> list[str]:
        for name in ("stderr.txt", "stdout.txt"):
            if lines := (self._work_dir / name).read_text(encoding="utf-8", errors="replace").strip().splitlines():
                return lines[-_TAIL_LINES:]
        return []


def _describe_exit(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
