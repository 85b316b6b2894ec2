"""Read selected series of a long journal into compact arrays.

A line takes a few microseconds, and a number of a selected series eight bytes. What counts is what `read` and
`effective` say, which the tests compare.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trackopt.journal.halves import ChildReader, find_middle
from trackopt.journal.history import find_history
from trackopt.journal.tables import ATTEMPT_EVENTS, OFFSET, STEP, TIME, Tables
from trackopt.utils.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trackopt.journal.lines import DamagedLine, Line
    from trackopt.journal.tables import Table


@dataclass(frozen=True, eq=False)
class Series:
    """Points of a series, as arrays of the same length.

    Attributes:
        steps: The steps.
        values: The values.

    Example:
        >>> list(Series.of([(1, 0.5), (2, 0.25)]))
        [(1, 0.5), (2, 0.25)]
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]]) -> Series:
        """Return the series of some points."""
        steps, values = zip(*points, strict=True) if points else ((), ())
        return cls(np.array(steps, np.int64), np.array(values, np.float64))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps.tolist(), self.values.tolist(), strict=True)


@dataclass(frozen=True)
class Columns:
    """The effective records of a journal.

    Attributes:
        steps: The step of each record, in order.
        seconds: The time since the previous record of the same attempt, or since the attempt began; 0 if unknown.
        time: When the last record was written, in Unix seconds; 0 if there is none.
        series: The selected series.
    """

    steps: NDArray[np.int64]
    seconds: NDArray[np.float64]
    time: float
    series: dict[str, Series]

    def first_lines(self) -> Series:
        """Return the seconds of the first record of each step."""
        latest = np.maximum.accumulate(self.steps)
        is_first = np.append(True, self.steps[1:] > latest[:-1])[: len(self.steps)]
        return Series(self.steps[is_first], self.seconds[is_first])


class ColumnReader:
    """Read a journal, and later what was appended to it.

    Args:
        path: The journal.
        select: Returns whether to keep a series.
    """

    def __init__(self, path: Path, select: Callable[[str], bool]) -> None:
        self._path = path
        self._select = select
        self._tables = Tables(select)

    @property
    def keys(self) -> Iterable[str]:
        """The names of all series."""
        return self._tables.keys

    @property
    def markers(self) -> Sequence[Line]:
        """The markers ``start``, ``resume`` and ``close``."""
        return self._tables.markers

    @property
    def damaged(self) -> Sequence[DamagedLine]:
        """The lines whose checksum is wrong."""
        return self._tables.damaged

    def update(self, progress: Callable[[int, int], None] | None = None, *, parallel: bool = False) -> bool:
        """Read the lines that were appended since the last call; return whether there were any.

        Args:
            progress: Called again and again with the bytes read and the size of the file.
            parallel: Use two cores, and a child process, if there is much to read.

        Raises:
            OSError: The file cannot be read, or is no regular file.
        """
        begin = self._tables.offset
        with open_regular(self._path) as file:
            size = os.fstat(file.fileno()).st_size
            middle = find_middle(file, begin, size) if parallel else size
            scale = (size - begin) / max(middle - begin, 1)

            def show(offset: int) -> None:
                if progress is not None:
                    progress(min(size, round(begin + scale * (offset - begin))), size)

            child = ChildReader(self._path, Tables(self._select, middle), size) if middle < size else None
            try:
                self._tables.read(file, middle, show)
                if child is not None and not child.finish(self._tables):
                    self._tables.read(file, size)
            finally:
                if child is not None:
                    child.close()
        return self._tables.offset > begin

    def build(self) -> Columns:
        """Return the effective records of what was read."""
        tables = list(self._tables)
        starts = [table.column(OFFSET).astype(np.int64) for table in tables]
        offsets = np.concatenate([np.empty(0, np.int64), *starts])
        order = np.argsort(offsets, kind="stable")
        steps, times = (
            np.concatenate([np.empty(0), *(table.column(number) for table in tables)])[order] for number in (STEP, TIME)
        )
        offsets = offsets[order]
        seconds = self._compute_seconds(times, offsets)
        kept = self._find_effective(steps, offsets)
        steps, offsets = steps[kept].astype(np.int64), offsets[kept]
        return Columns(
            steps=steps,
            seconds=seconds[kept],
            time=float(times[kept][-1]) if len(steps) else 0.0,
            series=self._collect_series(tables, starts, steps, offsets),
        )

    def _collect_series(
        self,
        tables: Sequence[Table],
        starts: Sequence[NDArray[np.int64]],
        steps: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> dict[str, Series]:
        """Return the selected series of the effective records, which have these steps and offsets."""
        pieces: dict[str, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {}
        for table, table_starts in zip(tables, starts, strict=True):
            positions = np.searchsorted(offsets, table_starts)
            kept = np.append(offsets, -1)[positions] == table_starts
            positions = positions[kept]
            if len(positions):
                for key, number in table.numbers.items():
                    column = table.column(number)
                    pieces.setdefault(key, []).append((positions, column if kept.all() else column[kept]))
        series = {}
        for key in filter(pieces.__contains__, self.keys):
            if len(pieces[key]) == 1:
                ((positions, values),) = pieces[key]
            else:
                positions, values = map(np.concatenate, zip(*pieces[key], strict=True))
                order = np.argsort(positions)
                positions, values = positions[order], values[order]
            series[key] = Series(steps if len(positions) == len(steps) else steps[positions], values)
        return series

    def _find_effective(self, steps: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        resumes = [marker for marker in self.markers if marker.event == "resume"]
        bounds = [0, *np.searchsorted(offsets, [marker.start_offset for marker in resumes]).tolist(), len(offsets)]
        effective = np.zeros(len(offsets), np.bool_)
        for stretch in find_history(resumes):
            part = slice(bounds[stretch.attempt], bounds[stretch.attempt + 1])
            effective[part] = (steps[part] <= stretch.max_step) & (offsets[part] < stretch.end_offset)
        return effective

    def _compute_seconds(self, times: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the time between each record and the previous line of the same attempt."""
        begins = [marker for marker in self.markers if marker.event in ATTEMPT_EVENTS]
        attempts = np.searchsorted([marker.start_offset for marker in begins], offsets)
        begun = np.array([np.nan, *(marker.time for marker in begins)])[attempts]
        is_first = np.append(True, np.diff(attempts) != 0)[: len(attempts)]
        seconds = times - np.where(is_first, begun, np.append(np.nan, times)[:-1])
        return np.where(seconds > 0, seconds, 0.0)
