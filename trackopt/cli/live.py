"""Runs that are read once, or followed while they go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from trackopt.cli import console
from trackopt.cli.ls import is_running
from trackopt.plotting.run_series import RunReader, RunSeries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import RenderableType

_LONG = 8 << 20  # bytes of a journal that take a moment
_MIN_INTERVAL_S = 1.0  # seconds between two looks at the journals
_DUTY_FACTOR = 9  # times as long as a look took: the training needs the cores


def read(places: Sequence[str], wanted: Callable[[str], bool]) -> list[RunReader]:
    """Read the journals of runs, with a bar for long ones."""
    readers = [RunReader(place, wanted) for place in dict.fromkeys(places)]
    for reader in readers:
        long = reader.journal.stat().st_size > _LONG
        with console.progress(f"reading {console.sanitize(reader.directory.name)}", shown=long) as progress:
            reader.update(progress)
    return readers


def read_runs(readers: Iterable[RunReader]) -> list[RunSeries]:
    """The runs as far as they were read; one that nobody holds and that was never closed was killed."""
    found = []
    for reader in readers:
        run = reader.run()
        killed = run.steps and not reader.closed and not is_running(reader.directory)
        found.append(replace(run, status="killed") if killed else run)
    return found


def follow(readers: Sequence[RunReader], render: Callable[[list[RunSeries]], Iterable[RenderableType]]) -> None:
    """Draw again whenever something is new, until all runs are over, or Ctrl-C.

    In a pipe nothing is drawn meanwhile. What is on the screen goes at the end; the caller draws it for good.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the terminal would stay without a cursor
    with contextlib.suppress(KeyboardInterrupt), _shown() as show:
        while True:
            start = time.monotonic()
            over = _all_finished(readers)  # asked first: what was written until then is read below
            for reader in readers:
                reader.update()
            show(lambda: render(read_runs(readers)))
            if over:
                return
            time.sleep(max(_MIN_INTERVAL_S, _DUTY_FACTOR * (time.monotonic() - start)))


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Callable[[], Iterable[RenderableType]]], None]]:
    """What draws on a terminal, in place of what it drew before; elsewhere nothing is drawn."""
    if not sys.stdout.isatty():
        yield lambda _: None
        return
    from rich.console import Console, Group
    from rich.live import Live

    screen = Console(highlight=False, markup=False, emoji=False)
    with Live(console=screen, auto_refresh=False, transient=True) as live:
        yield lambda render: live.update(Group(*render()), refresh=True)


def _all_finished(readers: Sequence[RunReader]) -> bool:
    return all(reader.closed or not is_running(reader.directory) for reader in readers)
