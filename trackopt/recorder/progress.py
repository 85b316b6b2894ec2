"""How far the recorder has come, and a bar that shows it to who waits for it."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import orjson

from trackopt import journal
from trackopt.errors import RunError
from trackopt.rundir.directory import read_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CURSORS = "recorder.json"
_SHOW_AFTER_S = 1.0  # seconds until there is a bar
_NAMES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "artifacts": "its artifacts"}


def delivered_fraction(directory: Path) -> float:
    """The part of a run's journal that its sinks have, from 0 to 1."""
    try:
        sinks = read_identity(directory)["sinks"]
        cursors = orjson.loads((directory / CURSORS).read_bytes())
        size = (directory / journal.NAME).stat().st_size
        offsets: list[int] = [cursors[name]["offset"] for name in sinks if name in cursors]
        return sum(min(1.0, offset / size) for offset in offsets) / len(sinks)
    except (OSError, RunError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0.0


@contextmanager
def progress_bar(directory: Path) -> Iterator[Callable[[], None]]:
    """A function that brings the bar up to date; there is one on a terminal only, and if it takes a while."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    names = " and ".join(_NAMES.get(name, name) for name in read_identity(directory).get("sinks", ()))
    task = progress.add_task(f"delivering to {names}", total=1.0)
    begin = time.monotonic()

    def show() -> None:
        if time.monotonic() - begin >= _SHOW_AFTER_S:
            progress.start()
            progress.update(task, completed=delivered_fraction(directory))

    try:
        yield show
    finally:
        progress.stop()
