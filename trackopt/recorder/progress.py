"""Show how much of a journal has been delivered."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import RunError
from trackopt.recorder.cursor import Cursor, CursorFile, UploadCursor
from trackopt.rundir.identity import read_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SHOW_AFTER_S = 1.0
_MAX_COUNTED_BYTES = 4 << 20  # of the journal; the points of the rest are estimated, since reading it takes seconds
_DISPLAY_NAMES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "artifacts": "MLflow artifacts"}


class OutstandingDelivery:
    """What the sinks of a run have not received when this object is made; ``str`` says it, and how far it is.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._journal = directory / journal.NAME
        self._offsets: dict[str, int] = {}  # where the delivery to each sink begins
        self._size = 0
        try:
            cursors = {name: self._cursor(name) for name in read_identity(directory).sinks or ()}
            self._size = self._journal.stat().st_size
        except (OSError, RunError):
            return
        self._offsets = {name: cursor.offset for name, cursor in cursors.items() if not cursor.finished}

    def __str__(self) -> str:
        """Return for example ``delivering 12,000 points to MLflow: 40 %``."""
        return f"{self.description}: {100 * self.fraction:.0f} %"

    @property
    def fraction(self) -> float:
        """The fraction that has been delivered since, from 0 to 1."""
        total = sum(self._size - offset for offset in self._offsets.values())
        left = sum(max(0, self._size - self._cursor(name).offset) for name in self._offsets)
        return max(0.0, 1 - left / total) if total > 0 else 0.0

    @cached_property
    def description(self) -> str:
        """What is delivered, and where: ``delivering 12,000 points to MLflow``."""
        where = " and ".join(_DISPLAY_NAMES.get(name, name) for name in self._offsets)
        return " ".join(filter(None, ("delivering", self._count_points(), f"to {where}" if where else "the rest")))

    def _cursor(self, name: str) -> UploadCursor:
        return CursorFile(self._directory).load(name, UploadCursor)

    def _count_points(self) -> str:
        """Return the number of points of the sink that has most to receive, in words; nothing if there are none."""
        counts = [self._count(name, offset) for name, offset in self._offsets.items() if name != "artifacts"]
        points, is_exact = max(counts, default=(0, True))
        about = "" if is_exact else "about "
        return f"{about}{points:,} points" if points else ""

    def _count(self, name: str, offset: int) -> tuple[int, bool]:
        """Return how many points of the journal a sink has yet to receive, and whether that is their exact number."""
        points, end, limit = 0, offset, min(self._size, offset + _MAX_COUNTED_BYTES)
        for line in journal.read(self._journal, offset):
            if line.start_offset >= limit:
                break
            points, end = points + len(line.metrics), line.end_offset
        every = CursorFile(self._directory).load(name, Cursor).every
        scale = (self._size - offset) / (end - offset) if end > offset else 1.0
        return round(points * scale / every), every == 1 and end >= self._size


@contextmanager
def progress_bar(outstanding: OutstandingDelivery) -> Iterator[Callable[[], None]]:
    """Yield a function that updates a progress bar, which a terminal shows after the first second."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("delivering", total=1.0)
    begin = time.monotonic()

    def update() -> None:
        if time.monotonic() - begin >= _SHOW_AFTER_S:
            progress.update(task, description=outstanding.description, completed=outstanding.fraction)
            progress.start()

    try:
        yield update
    finally:
        progress.stop()
