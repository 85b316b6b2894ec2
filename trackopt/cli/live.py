"""Read the journals of runs once, or follow them while the runs continue."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from trackopt.cli import console
from trackopt.plotting.run_series import RunReader, RunSeries
from trackopt.rundir.directory import is_running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import RenderableType

_PROGRESS_BAR_MIN_BYTES = 8 << 20
_MIN_INTERVAL_S = 1.0
_DUTY_FACTOR = 9  # pause relative to the time of one update: the training needs the cores


def open_runs(paths: Sequence[str], select: Callable[[str], bool]) -> list[RunReader]:
    """Read the journals of runs, with a progress bar for long ones."""
    readers = [RunReader(path, select) for path in dict.fromkeys(paths)]
    for reader in readers:
        is_long = reader.journal.stat().st_size > _PROGRESS_BAR_MIN_BYTES
        with console.progress_bar(f"reading {console.sanitize(reader.directory.name)}", shown=is_long) as progress:
            reader.update(progress)
        if reader.damage:
            click.echo(f"trackopt: {console.sanitize(reader.damage)}", err=True)
    return readers


def read_runs(readers: Iterable[RunReader]) -> list[RunSeries]:
    """Return the runs read so far; a run that was never closed and has no process was killed."""
    runs = []
    for reader in readers:
        run = reader.build_series()
        was_killed = run.steps and not reader.closed and not is_running(reader.directory)
        runs.append(replace(run, status="killed") if was_killed else run)
    return runs


def follow(readers: Sequence[RunReader], render: Callable[[list[RunSeries]], Iterable[RenderableType]]) -> None:
    """Redraw until all runs have finished or Ctrl-C; a pipe gets nothing.

    The live display is erased at the end; the caller then prints the final one.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the terminal stays without a cursor
    with contextlib.suppress(KeyboardInterrupt), _live_display() as show:
        while True:
            start = time.monotonic()
            finished = _all_finished(readers)  # checked before the update, which then reads the last records
            for reader in readers:
                reader.update()
            show(lambda: render(read_runs(readers)))
            if finished:
                return
            time.sleep(max(_MIN_INTERVAL_S, _DUTY_FACTOR * (time.monotonic() - start)))


@contextlib.contextmanager
def _live_display() -> Iterator[Callable[[Callable[[], Iterable[RenderableType]]], None]]:
    """Yield a function that replaces the previous drawing on a terminal, and does nothing elsewhere."""
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
