"""Which system calls a training makes, in which thread, as strace sees them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.robustness.faults.server import AT, SYS_GETPPID, Case

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.robustness.faults.forks import Server

_LINE = re.compile(r"(\d+) +\[ *(\d+)\] (?:<\.\.\. )?(\w+)(.*)")
_RESULT = re.compile(r"= (\d+)")
_TOLD = "(-1, "  # by the training, for logs
_NEVER_RETURN = ("exit", "exit_group", "rt_sigreturn", "restart_syscall")


@dataclass(frozen=True)
class Call:
    """One system call of a training.

    Attributes:
        thread: 0 is the main thread, the others follow in the order of their start.
        number: The system call's.
        name: Its name.
        nth: How often this thread had made it by then, counted from 1.
        text: Its arguments and result, as strace tells them.
    """

    thread: int
    number: int
    name: str
    nth: int
    text: str


def made(server: Server, case: Case, log: Path) -> list[Call]:
    """Run a case under strace; the calls that it made."""
    with server.traced("-n", "-y", "-o", str(log)):
        done = server.ask(case)
    assert done.through, done
    return list(_calls(log.read_text(errors="replace")))


def _calls(log: str) -> Iterator[Call]:
    lines = [match.groups() for match in map(_LINE.match, log.splitlines()) if match]
    main = next(pid for pid, number, _, _ in lines if int(number) == SYS_GETPPID)
    started = [_RESULT.findall(rest)[-1] for pid, _, name, rest in lines if pid == main and _starts(name, rest)]
    threads = {pid: thread for thread, pid in enumerate([main, *started])}
    counts: dict[tuple[str, str], int] = {}
    begun = set()
    for pid, number, name, rest in lines:
        if int(number) == SYS_GETPPID:
            begun.add(pid)
        elif pid in begun and name not in _NEVER_RETURN and not rest.startswith((" resumed", _TOLD)):
            counts[pid, name] = nth = counts.get((pid, name), 0) + 1
            assert nth < AT * 3 // 4  # a call that is not meant must not be hit
            yield Call(threads[pid], int(number), name, nth, rest)


def _starts(name: str, rest: str) -> bool:
    return name in {"clone", "clone3"} and "unfinished" not in rest
