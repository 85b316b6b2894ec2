"""Read selected series, hyperparameters and step times from the journals of runs, for curves and tables.

``metrics.jsonl`` → `RunReader` → `RunSeries`. A journal is read once and only the selected series are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt import journal
from trackopt.errors import RunError, UsageError
from trackopt.journal.columns import ColumnReader, Series
from trackopt.utils.suggest import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class RunSeries:
    """The series of a run so far.

    Attributes:
        path: The path that the user gave.
        name: The name of the run's directory.
        status: ``finished``, ``failed`` or ``killed``; ``None`` while it has not been closed.
        params: The run's parameters: ``optimizer``, ``group0.lr``, ``scheduler.step_size``, ….
        series: The effective points of the selected series.
        seconds: The seconds between each step and the previous line; pauses between attempts do not count.
        keys: The names of all series of the run.
    """

    path: str
    name: str
    status: str | None
    params: Mapping[str, Any]
    series: Mapping[str, Series]
    seconds: Series
    keys: frozenset[str]

    @property
    def steps(self) -> int:
        """The last recorded step; 0 if there is none."""
        return int(self.seconds.steps[-1]) if len(self.seconds) else 0


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
        ...     list(reader.build_series().series["loss"])
        True
        [(1, 0.5)]
    """

    def __init__(self, path: str | Path, select: Callable[[str], bool]) -> None:
        self.path = Path(path)
        self.journal = _find_journal(self.path)
        self.directory = self.journal.parent
        self._columns = ColumnReader(self.journal, select)

    @property
    def closed(self) -> bool:
        """True if the latest attempt has been closed."""
        return self._status is not None

    @property
    def damage(self) -> str:
        """One line about the damaged lines of the journal; empty if there are none."""
        damaged = self._columns.damaged
        return journal.describe_damage(self.journal, damaged) if damaged else ""

    def update(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Read the lines appended since the last call; return whether there were any.

        Args:
            progress: Called after every few megabytes with the bytes read and the size of the file.

        Raises:
            RunError: The journal cannot be read.
        """
        try:
            return self._columns.update(progress, parallel=True)
        except OSError as error:
            raise RunError(f"{self.journal}: cannot be read ({error.strerror}); check its permissions") from error

    def build_series(self) -> RunSeries:
        """Return the series of all lines read so far."""
        columns = self._columns.build()
        path, name, keys = str(self.path), self.directory.absolute().name, frozenset(self._columns.keys)
        return RunSeries(path, name, self._status, self._params, columns.series, columns.first_lines(), keys)

    @property
    def _status(self) -> str | None:
        markers = self._columns.markers
        if not markers or markers[-1].event != "close":
            return None
        return str(markers[-1].details.get("status", "finished")).lower()

    @property
    def _params(self) -> dict[str, Any]:
        found = [marker.details.get("params") for marker in self._columns.markers if marker.event != "close"]
        return next((params for params in reversed(found) if isinstance(params, dict)), {})


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
    if file.name == journal.NAME and file.exists():
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
