"""Show how much of a journal has been delivered."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import RunError
from trackopt.recorder.cursor import CursorFile, UploadCursor
from trackopt.rundir.identity import read_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SHOW_AFTER_S = 1.0
_DISPLAY_NAMES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "artifacts": "MLflow artifacts"}


def delivered_fraction(directory: Path) -> float:
    """Return the fraction of a run's journal that its sinks have received, from 0 to 1."""
    try:
        sinks = read_identity(directory).sinks or ()
        cursors = CursorFile(directory)
        size = (directory / journal.NAME).stat().st_size
        return sum(min(1.0, cursors.load(name, UploadCursor).offset / size) for name in sinks) / len(sinks)
    except (OSError, RunError, KeyError, TypeError, ZeroDivisionError):
        return 0.0


@contextmanager
def progress_bar(directory: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that updates a progress bar, which a terminal shows after the first second."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    names = " and ".join(_DISPLAY_NAMES.get(name, name) for name in read_identity(directory).sinks or ())
    task = progress.add_task(f"delivering to {names}", total=1.0)
    begin = time.monotonic()

    def update() -> None:
        if time.monotonic() - begin >= _SHOW_AFTER_S:
            progress.start()
            progress.update(task, completed=delivered_fraction(directory))

    try:
        yield update
    finally:
        progress.stop()
