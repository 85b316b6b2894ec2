"""One input looked at as the commands do, with a watchdog, and what came of it."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.fuzz.mutate import mutated
from trackopt import archive
from trackopt.cli import inspect, screen
from trackopt.errors import ArchiveError
from trackopt.integrity.report import check_file
from trackopt.summary import summarize

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 5
_DRAWN = 20  # one in so many is drawn as a screen too, which costs more than everything else
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.rename", "os.mkdir", "os.symlink", "subprocess.", "socket.")
_KEEP = 20


class Forbidden(BaseException):
    """Reading a file did what no reading does."""


class Hang(BaseException):
    """Reading a file takes too long."""


@dataclass
class Tally:
    """What came of many inputs.

    Attributes:
        count: By outcome.
        failures: How each input failed that was neither answered nor refused: its number, and the last lines.
        kib: Memory at most, above what it was at the start.
    """

    count: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    kib: int = 0

    def add(self, other: Tally) -> None:
        """Count another part's outcomes in."""
        self.count += other.count
        self.failures += other.failures
        self.kib = max(self.kib, other.kib)


_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(_EVENTS):
        raise Forbidden(f"{event} {arguments!r}")


def run(files: Sequence[tuple[str, bytes]], seed: int, numbers: range) -> Tally:
    """Make the inputs with these numbers and look at each; the same seed and number are the same input."""
    sys.addaudithook(_watch)
    previous = signal.signal(signal.SIGALRM, _too_long)
    tally, start = Tally(), _peak()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            name, data = made(files, seed, number)
            path = Path(folder) / f"input{Path(name).suffix}"
            path.write_bytes(data)
            outcome, failure = _watched(path, draw=number % _DRAWN == 0)
            tally.count[outcome] += 1
            if failure and len(tally.failures) < _KEEP:
                tally.failures.append((number, failure))
            path.unlink()
            if left := sorted(Path(folder).iterdir()):
                tally.failures.append((number, f"it left {left}"))
    signal.signal(signal.SIGALRM, previous)
    tally.kib = _peak() - start
    return tally


def made(files: Sequence[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """The input with this number."""
    random = Random(f"{seed}:{number}")
    name, data = random.choice(files)
    return name, mutated(name, data, files, random)


def _watched(path: Path, *, draw: bool) -> tuple[str, str]:
    global _watching
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # where not even a signal gets through
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watching = True
    try:
        return _looked(path, draw=draw), ""
    except ArchiveError as error:
        if "\n" in str(error):
            return "failed", f"an error of several lines: {error}"
        return "refused", ""
    except BaseException as error:  # noqa: BLE001 - finding these is what this is for
        return "failed", "".join(traceback.format_exception(error)[-4:])
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _looked(path: Path, *, draw: bool) -> str:
    check_file(path)
    with archive.open(path) as opened:
        summary = summarize(opened, tensors=True)
        screen.plain(summary.as_dict())
        if draw:
            screen.lines(inspect.drawn(summary))
        for _, tensor in opened.tensors():
            if tensor.nbytes < 1 << 20:
                try:
                    opened.read(tensor)
                except ArchiveError:
                    return "partly readable"
    return "problems told" if any(one.level == "error" for one in summary.findings) else "sound"


def _too_long(*_: object) -> None:
    raise Hang(f"more than {SECONDS} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
