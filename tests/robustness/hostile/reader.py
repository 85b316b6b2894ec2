"""Runs trackopt's command line on one file after the other, each in a forked child with limits.

A program for `tests.test_hostile`: requests are JSON lines on stdin, ``[[["inspect", PATH], …], DST]``; so are the
lists of answers. It never imports torch, and a child that opens any file but DST for writing or starts a program is
ended with 71.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy  # noqa: F401 - what children need is imported before the fork, so that one is cheap
import rich.table  # noqa: F401

from trackopt import cli
from trackopt.analysis.summary import statistics  # noqa: F401
from trackopt.archive.formats import torch_zip  # noqa: F401
from trackopt.cli import diff, inspect, salvage, verify  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS = 20  # of CPU, some five times what the longest takes: slow is for benchmarks, this is for what never ends
_ADDRESS_SPACE = 4 << 30
_CRASHED, _FORBIDDEN = 70, 71
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.truncate")
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.", "socket.")


def _watch(target: str) -> Callable[[str, tuple[object, ...]], None]:
    def watch(event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        elsewhere = (writes or event.startswith(_CHANGES)) and str(arguments[0]) != target
        if elsewhere or event.startswith(_EVENTS):
            os.write(2, f"FORBIDDEN {event} {arguments!r}\n".encode())
            os._exit(_FORBIDDEN)

    return watch


def _run(arguments: list[str], target: str, streams: tuple[int, int]) -> None:
    """The child: it does not return."""
    code = _CRASHED
    try:
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        signal.alarm(6 * _SECONDS)  # for one that waits: a busy machine must not make a test fail
        sys.addaudithook(_watch(target))
        sys.argv = ["trackopt", *arguments]
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - whatever it is, it is what the test is about
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Child:
    """A command that runs.

    Attributes:
        pid: The process.
        streams: What it writes its output and its errors to.
    """

    pid: int
    streams: tuple[int, int]

    def answer(self) -> dict[str, object]:
        """How it ended, what it said, and its KiB of memory at most."""
        _, status, usage = os.wait4(self.pid, 0)
        texts = [Path(f"/proc/self/fd/{stream}").read_text("utf-8", "replace") for stream in self.streams]
        for stream in self.streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "out": texts[0], "err": texts[1], "kib": usage.ru_maxrss}


def started(arguments: list[str], target: str) -> Child:
    """Begin a command."""
    streams = os.memfd_create("out"), os.memfd_create("err")
    child = os.fork()
    if child == 0:
        _run(arguments, target, streams)
    return Child(child, streams)


if __name__ == "__main__":
    for line in sys.stdin:
        commands, target = json.loads(line)
        children = [started(arguments, target) for arguments in commands]
        sys.stdout.write(json.dumps([child.answer() for child in children]) + "\n")
        sys.stdout.flush()
