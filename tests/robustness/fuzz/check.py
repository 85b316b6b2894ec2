"""One input looked at as the commands do, with a watchdog, and what came of it."""

from __future__ import annotations

import faulthandler
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, deque
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.robustness.fuzz.mutate import mutated
from trackopt import archive, locations
from trackopt.analysis.diff import diff as diff_checkpoints
from trackopt.analysis.summary import summarize
from trackopt.analysis.verify import verify
from trackopt.cli import console, diff, inspect, outline
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.robustness.fuzz.mutate import Content

SECONDS = 5
_DRAWN = 20  # one in so many is drawn as a screen too, which costs more than everything else
_COMPARED = 3  # and one in so many is compared with what it was made from
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


def run(files: Sequence[tuple[str, Content]], seed: int, numbers: range) -> Tally:
    """Make the inputs with these numbers and look at each; the same seed and number are the same input."""
    sys.addaudithook(_watch)
    previous = signal.signal(signal.SIGPROF, _too_long)
    tally, start = Tally(), _peak()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            name, before, after = made(files, seed, number)
            paths = [Path(folder) / f"{side}{Path(name).suffix}" for side in ("before", "after")]
            for path, content in zip(paths, (before, after), strict=True):
                place(path, content)
            there = sorted(Path(folder).rglob("*"))
            outcome, failure = _watched(paths[0], paths[1], number)
            tally.count[outcome] += 1
            if failure and len(tally.failures) < _KEEP:
                tally.failures.append((number, failure))
            if sorted(Path(folder).rglob("*")) != there:
                tally.failures.append((number, "it changed what is there"))
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    signal.signal(signal.SIGPROF, previous)
    tally.kib = _peak() - start
    return tally


def made(files: Sequence[tuple[str, Content]], seed: int, number: int) -> tuple[str, Content, Content]:
    """The input with this number: its name, what it was made from, and what it is."""
    random = Random(f"{seed}:{number}")
    name, content = random.choice(files)
    return name, content, mutated(name, content, files, random)


def place(path: Path, content: Content) -> None:
    """Write a file, or a directory."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir()
    for name, data in content.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)


def _watched(before: Path, path: Path, number: int) -> tuple[str, str]:
    global _watching
    faulthandler.dump_traceback_later(12 * SECONDS, exit=True)  # where it waits, or no signal gets through
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor's time: a busy machine must not make a test fail
    _watching = True
    try:
        return _looked(before, path, number), ""
    except ArchiveError as error:
        if "\n" in str(error):
            return "failed", f"an error of several lines: {error}"
        return "refused", ""
    except BaseException as error:  # noqa: BLE001 - finding these is what this is for
        return "failed", "".join(traceback.format_exception(error)[-4:])
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _looked(before: Path, path: Path, number: int) -> str:
    draw = number % _DRAWN == 0
    list(verify(path))
    with locations.open(path) as opened:
        summary = summarize(opened, tensors=True, statistics=True)
        console.to_plain(summary.as_dict())
        deque(outline.format_outline(opened.tree), maxlen=0)
        if draw:
            console.render_lines(inspect.render(summary))
            console.render_lines(inspect.render(replace(summary, tensors=None)))
        readable = _read(opened)
    if draw or number % _COMPARED == 0:
        _compare(before, path, draw=draw)
    if not readable:
        return "partly readable"
    return "problems told" if any(one.level == "error" for one in summary.findings) else "sound"


def _read(opened: archive.Archive) -> bool:
    try:
        for _, tensor in opened.tensors():
            if tensor.nbytes < 1 << 20:
                opened.read(tensor)
    except ArchiveError:
        return False
    return True


def _compare(before: Path, path: Path, *, draw: bool) -> None:
    try:
        console.to_plain(diff_checkpoints(before, path).as_dict())
        if draw:
            with redirect_stdout(io.StringIO()):
                diff.command.main([str(before), str(path), "--tensors"], standalone_mode=False)
    except ArchiveError:
        return  # the input opens, so it was what it is made from that does not, or a value cannot be read


def _too_long(*_: object) -> None:
    raise Hang(f"more than {SECONDS} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
