"""A process that has torch loaded and forks one child for each case: ``python -m tests.robustness.faults.server``.

Cases come as JSON lines, outcomes go as JSON lines. It has one thread, so that a fork is all of it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.robustness.faults.training import Told

AT = 500  # the call at which strace does its harm, counted in each thread and for each system call
SECONDS = 60
_LIBC = ctypes.CDLL(None, use_errno=True)
_ANYBODY_MAY_TRACE = (0x59616D61, ctypes.c_ulong(-1))  # prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
SYS_GETPPID = {"x86_64": 110, "aarch64": 173}.get(os.uname().machine, -1)


@dataclass(frozen=True)
class Case:
    """One training, and what happens to it.

    Attributes:
        directory: Of the run.
        epochs: Where it ends.
        kill_after: Seconds after which it is killed, if it is.
        call: The number of a system call that it makes so often without effect that strace hits the ``nth`` real one.
        nth: Counted from 1.
        thread: Where: 0 is the main thread, the others follow in the order of their start.
        short: ``write`` or ``pwrite``, whose ``nth`` call writes only a part.
        part: The part that it writes; 0 is a single byte.
        log: Whether it says to a log of system calls what it has done.
    """

    directory: str
    epochs: int
    kill_after: float | None = None
    call: int | None = None
    nth: int = 0
    thread: int = 0
    short: str | None = None
    part: float = 0.0
    log: bool = False


def main() -> None:
    from tests.robustness.faults.training import Told, train

    warnings.simplefilter("ignore")
    logging.getLogger("trackopt").addHandler(logging.NullHandler())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.cpu_count = lambda: 1  # or threads share the reading of a checkpoint, never twice in the same way
    told = Told()
    with tempfile.TemporaryDirectory() as folder:  # whatever is imported late is imported now
        for epochs in (1, 2):
            train(Path(folder) / "run", epochs, told)
    _LIBC.prctl(*_ANYBODY_MAY_TRACE, 0, 0, 0)
    _answer({"pid": os.getpid()})
    for line in iter(sys.stdin.readline, ""):
        told.clear()
        case = Case(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            _child(case, told)
        if case.kill_after is not None:
            time.sleep(case.kill_after)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _answer({"status": status, **told.facts()})


def _answer(facts: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _child(case: Case, told: Told) -> None:
    from tests.robustness.faults.training import train
    from trackopt import TrackoptError

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trackopt").addHandler(handler)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)  # what hangs is ended by SIGALRM
    told.aloud = case.log
    _number_threads(case)
    if case.short is not None:
        _write_short(case)
    _prelude(case, 0)
    try:
        train(Path(case.directory), case.epochs, told)
        code = 0
    except TrackoptError as error:
        told.note({"error": f"{type(error).__name__}: {error}"})
        code = 1
    except BaseException as error:  # noqa: BLE001 - finding these is what this is for
        told.note({"traceback": "".join(traceback.format_exception(error))[-2500:]})
        code = 2
    told.note({"messages": messages})
    os._exit(code)


def _prelude(case: Case, thread: int) -> None:
    """Lead strace's count up to the call that is meant, or show a log where the thread's own calls begin."""
    if case.log:
        _LIBC.syscall(SYS_GETPPID)
    elif case.call is not None and case.thread == thread:
        for _ in range(AT - case.nth):
            _LIBC.syscall(case.call, -1, 0, 0, 0, 0, 0)


def _number_threads(case: Case) -> None:
    numbers, start = itertools.count(1), threading.Thread.start

    def numbered(thread: threading.Thread) -> None:
        number, run = next(numbers), thread.run

        def led() -> None:
            _prelude(case, number)
            run()

        thread.run = led  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = numbered  # type: ignore[method-assign]


def _write_short(case: Case) -> None:
    real, numbers = getattr(os, case.short), itertools.count(1)

    def call(file: int, data: bytes, *rest: int) -> int:
        if next(numbers) == case.nth:
            data = data[: int(len(data) * case.part) or 1]
        return int(real(file, data, *rest))

    setattr(os, case.short, call)


def sent(case: Case) -> str:
    """A case as it is sent."""
    return json.dumps(asdict(case)) + "\n"


if __name__ == "__main__":
    main()
