"""Harm at each system call of a training: SIGKILL before it, an error instead of it, a write that writes less."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from tests.robustness.faults import calls
from tests.robustness.faults.fixtures import Violation, told
from tests.robustness.faults.runner import Trial, Worker
from tests.robustness.faults.server import AT, Case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.robustness.faults.calls import Call
    from tests.robustness.faults.fixtures import Fixtures, Scenario
    from tests.robustness.faults.forks import Outcome, Server

_READS = ("pread64", "read", "lseek", "getdents64", "newfstatat", "fstat", "stat", "lstat", "statx", "access", "statfs")
_READING = (("EIO", False), ("EINTR", False))
_CHANGING = (*_READING, ("ENOSPC", False), ("ENOSPC", True), ("EIO", True))
_SILENT = ("-e", "raw=all", "-o", "/dev/null", "-e", "trace=all", "-e")
_ATTEMPTS = 3
_WRITES = {"write": 15, "pwrite": 4}  # at most so many in a training


def traced(fixtures: Fixtures, server: Server, folder: Path) -> dict[str, list[Call]]:
    """The system calls of both trainings, from ``wrap`` to the end.

    How often a thread waits for another is not always the same: what only one of two trainings made is left out.
    """
    found = {}
    for name, start in fixtures.starts.items():
        twice = []
        for _ in range(2):
            directory = folder / name
            shutil.rmtree(directory, ignore_errors=True)
            start.place(directory)
            twice.append(calls.made(server, Case(str(directory), start.epochs, log=True), folder / f"{name}.log"))
        again = {(call.thread, call.name, call.nth) for call in twice[1]}
        found[name] = [call for call in twice[0] if (call.thread, call.name, call.nth) in again]
    return found


def kills(fixtures: Fixtures, found: dict[str, list[Call]]) -> list[Trial]:
    """SIGKILL before each."""
    return [
        Trial(
            f"kill-{_named(name, call)}", partial(_killed, fixtures.starts[name], call), _strace("all:signal=SIGKILL")
        )
        for name, made in found.items()
        for call in made
    ]


def errors(fixtures: Fixtures, found: dict[str, list[Call]], folder: Path) -> list[Trial]:
    """Each error at each call that concerns the run's directory: once, and from then on."""
    return [
        Trial(
            f"{error.lower()}{'-on' if lasting else ''}-{_named(name, call)}",
            partial(_hindered, fixtures.starts[name], call, lasting),
            _strace(f"{call.name}:error={error}", lasting=lasting),
        )
        for name, made in found.items()
        for call in made
        if str(folder / name) in call.text
        for error, lasting in (_READING if call.name in _READS else _CHANGING)
    ]


def short_writes(fixtures: Fixtures) -> list[Trial]:
    """One byte, or a half, of each write."""
    return [
        Trial(f"short-{name}-{call}-{nth}-{part}", partial(_shortened, start, call, nth, part))
        for name, start in fixtures.starts.items()
        for call, most in _WRITES.items()
        for nth in range(1, most + 1)
        for part in (0.0, 0.5)
    ]


def _strace(harm: str, *, lasting: bool = False) -> tuple[str, ...]:
    return (*_SILENT, f"inject={harm}:when={AT}{'+' if lasting else ''}")


def _named(name: str, call: Call) -> str:
    return f"{name}-{call.thread}-{call.name}-{call.nth}"


def _killed(start: Scenario, call: Call, worker: Worker, directory: Path) -> tuple[Counter[str], list[Violation]]:
    """A call that depends on how threads meet may need a few attempts."""
    for _ in range(_ATTEMPTS):
        shutil.rmtree(directory, ignore_errors=True)
        done = _hit(start, call, worker, directory)
        if done.status < 0:
            break
    judged = worker.fixtures.judge(worker.sound, directory, **told(done, start))
    return Counter(["system calls swept" if done.status < 0 else "not made again"]), [*_ill(done), *judged]


def _hindered(
    start: Scenario, call: Call, lasting: bool, worker: Worker, directory: Path
) -> tuple[Counter[str], list[Violation]]:
    done = _hit(start, call, worker, directory)
    loses_lines = lasting and call.name == "write"  # and says so
    judged = worker.fixtures.judge(worker.sound, directory, **told(done, start), series=not loses_lines)
    return Counter(["faults injected"]), [*_ill(done), *_other(done, start, worker), *judged]


def _hit(start: Scenario, call: Call, worker: Worker, directory: Path) -> Outcome:
    start.place(directory)
    return worker.harmed.ask(Case(str(directory), start.epochs, call=call.number, nth=call.nth, thread=call.thread))


def _shortened(
    start: Scenario, call: str, nth: int, part: float, worker: Worker, directory: Path
) -> tuple[Counter[str], list[Violation]]:
    start.place(directory)
    done = worker.harmed.ask(Case(str(directory), start.epochs, short=call, nth=nth, part=part))
    judged = worker.fixtures.judge(worker.sound, directory, **told(done, start))
    refused = [Violation("errors", done.error)] if done.error else []
    return Counter(["short writes"]), [*refused, *_ill(done), *_other(done, start, worker), *judged]


def _ill(done: Outcome) -> list[Violation]:
    return [Violation("errors", done.ill)] if done.ill else []


def _other(done: Outcome, start: Scenario, worker: Worker) -> list[Violation]:
    """Training that went on, though something failed, came to what it always comes to."""
    if done.through and done.digest != worker.fixtures.whole[start.epochs].digest:
        return [Violation("other results", "the state is another, though training came to its end")]
    return []
