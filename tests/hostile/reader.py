"""Runs trackopt's command line on one file after the other, each in a forked child with limits.

A program for `tests.test_hostile`: requests are JSON lines on stdin, ``["inspect", PATH]``; so are the answers. It
never imports torch, and a child that opens a file for writing or starts a program is ended with 71.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from trackopt import cli, summary  # noqa: F401 - imported before the fork, so that a child is cheap
from trackopt.cli import diff, inspect, verify  # noqa: F401

SECONDS = 5
_ADDRESS_SPACE = 4 << 30
_CRASHED, _FORBIDDEN = 70, 71
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "subprocess.", "socket.")


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    flags = arguments[2] if event == "open" else 0
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(_EVENTS):
        os.write(2, f"FORBIDDEN {event} {arguments!r}\n".encode())
        os._exit(_FORBIDDEN)


def _run(arguments: list[str], streams: tuple[int, int]) -> None:
    """The child: it does not return."""
    code = _CRASHED
    try:
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
        signal.alarm(6 * SECONDS)  # for one that waits: a busy machine must not make a test fail
        sys.addaudithook(_watch)
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


def answer(arguments: list[str]) -> dict[str, object]:
    """Run a command; how it ended, what it said, its seconds of CPU and its KiB of memory at most."""
    streams = os.memfd_create("out"), os.memfd_create("err")
    child = os.fork()
    if child == 0:
        _run(arguments, streams)
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    texts = [Path(f"/proc/self/fd/{stream}").read_text("utf-8", "replace") for stream in streams]
    for stream in streams:
        os.close(stream)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": seconds, "kib": usage.ru_maxrss}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
