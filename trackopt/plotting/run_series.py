"""What the journals of runs say, for curves and tables: the wanted series, the hyperparameters, the time of each step.

``metrics.jsonl`` → `RunReader` → `RunSeries`. A long journal is read once, and only what is wanted of it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt import journal
from trackopt.errors import RunError, UsageError
from trackopt.utils.suggest import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trackopt.journal import Line

_SECONDS = "seconds"


@dataclass(frozen=True)
class RunSeries:
    """A run, as far as it has come.

    Attributes:
        path: As it was named.
        name: Its directory's name.
        status: ``finished``, ``failed`` or ``killed``; ``None`` while it has not been closed.
        params: What it was started with: ``optimizer``, ``group0.lr``, ``scheduler.step_size``, ….
        series: The effective points ``(step, value)`` of the wanted series.
        seconds: For each step the time that it took, from the line before; pauses between attempts do not count.
        keys: The names of all its series.
    """

    path: str
    name: str
    status: str | None
    params: dict[str, Any]
    series: dict[str, list[tuple[int, float]]]
    seconds: list[tuple[int, float]]
    keys: frozenset[str]

    @property
    def steps(self) -> int:
        """The last step that was recorded; 0 for none."""
        return self.seconds[-1][0] if self.seconds else 0


class RunReader:
    """Reads the journal of a run, and goes on where it stopped.

    Args:
        place: A run's directory, or its ``metrics.jsonl``.
        select: Whether a series is to be kept.

    Raises:
        RunError: There is no journal.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = journal.Journal(Path(folder) / "metrics.jsonl")
        ...     writer.record(1, {"loss": 0.5, "accuracy": 0.9})
        ...     writer.close()
        ...     reader = RunReader(folder, select=lambda key: key == "loss")
        ...     reader.update()
        ...     reader.run().series
        True
        {'loss': [(1, 0.5)]}
    """

    def __init__(self, place: str | Path, select: Callable[[str], bool]) -> None:
        self.place = Path(place)
        self.journal = _journal(self.place)
        self.directory = self.journal.parent
        self.closed = False
        self._wanted = select
        self._known: dict[str, bool] = {}
        self._lines: list[Line] = []
        self._params: dict[str, Any] = {}
        self._status: str | None = None
        self._offset = 0
        self._before: float | None = None  # when the line before was written, in the same attempt

    def update(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Read what was appended since; whether there was anything.

        Args:
            progress: Told now and then how many bytes are read, and of how many.

        Raises:
            RunError: It cannot be read.
        """
        start = self._offset
        try:
            size = self.journal.stat().st_size
            for number, line in enumerate(journal.read(self.journal, self._offset)):
                self._offset = line.end_offset
                self._take(line)
                if progress is not None and number % 1000 == 0:
                    progress(self._offset, size)
        except OSError as error:
            raise RunError(f"{self.journal}: cannot be read ({error.strerror}); check its permissions") from error
        return self._offset > start

    def run(self) -> RunSeries:
        """The run, as far as it was read."""
        series: dict[str, list[tuple[int, float]]] = {}
        seconds: list[tuple[int, float]] = []
        for record in journal.effective(self._lines):
            for key, value in record.metrics.items():
                series.setdefault(key, []).append((record.step, value))
            if not seconds or record.step > seconds[-1][0]:
                seconds.append((record.step, record.details.get(_SECONDS, 0.0)))
        path, keys = str(self.place), frozenset(self._known)
        return RunSeries(path, self.directory.absolute().name, self._status, self._params, series, seconds, keys)

    def _take(self, line: Line) -> None:
        if line.event in {"start", "resume"}:
            params = line.details.get("params")
            self._params = params if isinstance(params, dict) else self._params
            self._status, self._before = None, None
        if line.event == "close":
            self._status = str(line.details.get("status", "finished")).lower()
        self.closed = self._status is not None
        if line.event == "resume":
            self._lines.append(line)
        elif line.event is None and line.metrics:
            seconds = {} if self._before is None else {_SECONDS: max(0.0, line.time - self._before)}
            metrics = {key: value for key, value in line.metrics.items() if self._is_selected(key)}
            self._lines.append(replace(line, metrics=metrics, details=seconds))
        if not line.histograms and line.event != "checkpoint":
            self._before = line.time

    def _is_selected(self, key: str) -> bool:
        if key not in self._known:
            self._known[key] = self._wanted(key)
        return self._known[key]


def require_series(runs: Sequence[RunSeries], key: str) -> None:
    """Insist that each run has a series.

    Raises:
        UsageError: One of them has not; the nearest right name is told.
    """
    for run in runs:
        if key not in run.series:
            own = [other for other in run.keys if "/" not in other] or run.keys
            there = suggest(key, own) if own else "nothing is recorded yet"
            raise UsageError(f"{run.path}: has no series {key} (--metric names one); {there}")


def names(runs: Sequence[RunSeries]) -> list[str]:
    """What to call each run: its directory's name, or its path where two have the same."""
    short = [run.name for run in runs]
    return [run.name if short.count(run.name) == 1 else run.path for run in runs]


def _journal(place: Path) -> Path:
    file = place / journal.NAME if place.is_dir() else place
    if file.is_file() and file.name == journal.NAME:
        return file
    inside = _runs_in(place)
    if inside:
        raise RunError(f"{place}: no run, but a directory with {len(inside)}; name runs, as {place / inside[0]}")
    problem = f"has no journal ({journal.NAME})" if place.exists() else "there is no such run"
    others = _runs_in(place.parent)
    there = suggest(place.name, others, within=place.parent) if others else "name a directory of wrap()"
    raise RunError(f"{place}: {problem}; {there}")


def _runs_in(directory: Path) -> list[str]:
    try:
        return sorted(child.name for child in directory.iterdir() if (child / journal.NAME).is_file())
    except OSError:
        return []
