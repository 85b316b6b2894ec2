"""Read selected series, hyperparameters and step times from the journals of runs, for curves and tables.

``metrics.jsonl`` → `RunReader` → `RunSeries`. A journal is read once and only the selected series are kept.
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
    """The series of a run so far.

    Attributes:
        path: The path that the user gave.
        name: The name of the run's directory.
        status: ``finished``, ``failed`` or ``killed``; ``None`` while it has not been closed.
        params: The run's parameters: ``optimizer``, ``group0.lr``, ``scheduler.step_size``, ….
        series: The effective points ``(step, value)`` of the selected series.
        seconds: ``(step, seconds since the previous line)``; pauses between attempts do not count.
        keys: The names of all series of the run.
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
        """The last recorded step; 0 if there is none."""
        return self.seconds[-1][0] if self.seconds else 0


class RunReader:
    """Incremental reader of a run's journal.

    Args:
        path: A run's directory, or its ``metrics.jsonl``.
        select: Returns whether to keep a series.

    Raises:
        RunError: The path has no journal.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = journal.Journal(Path(folder) / "metrics.jsonl")
        ...     writer.record(1, {"loss": 0.5, "accuracy": 0.9})
        ...     writer.close()
        ...     reader = RunReader(folder, select=lambda key: key == "loss")
        ...     reader.update()
        ...     reader.build_series().series
        True
        {'loss': [(1, 0.5)]}
    """

    def __init__(self, path: str | Path, select: Callable[[str], bool]) -> None:
        self.path = Path(path)
        self.journal = _find_journal(self.path)
        self.directory = self.journal.parent
        self.closed = False
        self._select = select
        self._selected: dict[str, bool] = {}
        self._lines: list[Line] = []
        self._params: dict[str, Any] = {}
        self._status: str | None = None
        self._offset = 0
        self._previous_time: float | None = None  # of the previous line of the same attempt

    def update(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Read the lines appended since the last call; return whether there were any.

        Args:
            progress: Called every 1000 lines with the bytes read and the size of the file.

        Raises:
            RunError: The journal cannot be read.
        """
        start = self._offset
        try:
            size = self.journal.stat().st_size
            for number, line in enumerate(journal.read(self.journal, self._offset)):
                self._offset = line.end_offset
                self._add_line(line)
                if progress is not None and number % 1000 == 0:
                    progress(self._offset, size)
        except OSError as error:
            raise RunError(f"{self.journal}: cannot be read ({error.strerror}); check its permissions") from error
        return self._offset > start

    def build_series(self) -> RunSeries:
        """Return the series of all lines read so far."""
        series: dict[str, list[tuple[int, float]]] = {}
        seconds: list[tuple[int, float]] = []
        for record in journal.effective(self._lines):
            for key, value in record.metrics.items():
                series.setdefault(key, []).append((record.step, value))
            if not seconds or record.step > seconds[-1][0]:
                seconds.append((record.step, record.details.get(_SECONDS, 0.0)))
        path, keys = str(self.path), frozenset(self._selected)
        return RunSeries(path, self.directory.absolute().name, self._status, self._params, series, seconds, keys)

    def _add_line(self, line: Line) -> None:
        if line.event in {"start", "resume"}:
            params = line.details.get("params")
            self._params = params if isinstance(params, dict) else self._params
            self._status, self._previous_time = None, None
        if line.event == "close":
            self._status = str(line.details.get("status", "finished")).lower()
        self.closed = self._status is not None
        if line.event == "resume":
            self._lines.append(line)
        elif line.event is None and line.metrics:
            seconds = {} if self._previous_time is None else {_SECONDS: max(0.0, line.time - self._previous_time)}
            metrics = {key: value for key, value in line.metrics.items() if self._is_selected(key)}
            self._lines.append(replace(line, metrics=metrics, details=seconds))
        if line.event in {"start", "resume"} or (line.event is None and not line.histograms):
            self._previous_time = line.time

    def _is_selected(self, key: str) -> bool:
        if key not in self._selected:
            self._selected[key] = self._select(key)
        return self._selected[key]


def require_series(runs: Sequence[RunSeries], key: str) -> None:
    """Check that every run has a series.

    Raises:
        UsageError: A run lacks the series; the message suggests the nearest name.
    """
    for run in runs:
        if key not in run.series:
            candidates = [name for name in run.keys if "/" not in name] or run.keys
            hint = suggest(key, candidates) if candidates else "nothing is recorded yet"
            raise UsageError(f"{run.path}: no series {key!r}; {hint} (choose with --metric)")


def display_names(runs: Sequence[RunSeries]) -> list[str]:
    """Return a name for each run: its directory's name, or its path if two directories share a name."""
    short = [run.name for run in runs]
    return [run.name if short.count(run.name) == 1 else run.path for run in runs]


def _find_journal(path: Path) -> Path:
    file = path / journal.NAME if path.is_dir() else path
    if file.is_file() and file.name == journal.NAME:
        return file
    run_names = _list_runs(path)
    if run_names:
        raise RunError(
            f"{path}: not a run, but a directory of {len(run_names)} runs; name a run, such as {path / run_names[0]}"
        )
    problem = f"has no journal ({journal.NAME})" if path.exists() else "no such run"
    siblings = _list_runs(path.parent)
    hint = suggest(path.name, siblings, within=path.parent) if siblings else "name the directory given to wrap(dir=…)"
    raise RunError(f"{path}: {problem}; {hint}")


def _list_runs(directory: Path) -> list[str]:
    try:
        return sorted(child.name for child in directory.iterdir() if (child / journal.NAME).is_file())
    except OSError:
        return []
