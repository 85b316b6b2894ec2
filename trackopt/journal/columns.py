"""Read selected series of a long journal into compact arrays.

A line takes a few microseconds, and a number of a selected series eight bytes. What counts is what `read` and
`effective` say, which the tests compare.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from trackopt.journal.history import find_history
from trackopt.journal.lines import CHECKSUM_BYTES, CHECKSUM_FIELD, MAX_STEP, DamagedLine, Line, crc32, decode
from trackopt.utils.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 18  # stays in a core's cache
_STEP, _TIME, _OFFSET, _HEAD = range(4)  # the columns of a table before the metrics, and their number
_ATTEMPT_EVENTS = ("start", "resume")
_EVENTS = (*_ATTEMPT_EVENTS, "close")
_CHECKSUM = len(CHECKSUM_FIELD) - CHECKSUM_BYTES


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


class _Table:
    """The records with the same keys, in order.

    Args:
        keys: The keys of all metrics of a record.
        select: Returns whether to keep a series.

    Attributes:
        keys: The same keys.
        heads: Step, time and offset of each record that is not flushed, one after the other.
        values: All of their metrics.
    """

    def __init__(self, keys: list[str], select: Callable[[str], bool]) -> None:
        self.keys = keys
        self.heads: list[Any] = []
        self.values: list[Any] = []
        self.numbers = {key: _HEAD + index for index, key in enumerate(keys) if select(key)}
        self._columns: dict[int, list[NDArray[np.float64]]] = {
            number: [] for number in (_STEP, _TIME, _OFFSET, *self.numbers.values())
        }

    def add(self, line: Line) -> None:
        """Append a record."""
        self.heads += (line.step, line.time, line.start_offset)
        self.values += line.metrics.values()

    def flush(self) -> None:
        """Keep the selected columns of the records that were appended."""
        try:
            heads, values = array("d", self.heads), array("d", self.values)
        except (TypeError, OverflowError):  # NaN is text
            heads, values = self._convert()
        rows = np.frombuffer(heads, np.float64).reshape(-1, _HEAD), np.frombuffer(values, np.float64)
        columns = *rows[0].T, *rows[1].reshape(-1, len(self.keys)).T
        is_valid = np.abs(columns[_STEP]) < MAX_STEP
        for number, blocks in self._columns.items():
            blocks.append(columns[number][is_valid])
        self.heads.clear()
        self.values.clear()

    def column(self, number: int) -> NDArray[np.float64]:
        """Return a column of all records that are flushed."""
        joined = np.concatenate(self._columns[number])
        self._columns[number] = [joined]  # or everything would be in memory twice
        return joined

    def _convert(self) -> tuple[array[float], array[float]]:
        """Convert each record as `decode` does; those that hold something else than numbers are skipped."""
        heads, values = array("d"), array("d")
        for index in range(len(self.heads) // _HEAD):
            step, when, start = self.heads[index * _HEAD : (index + 1) * _HEAD]
            row = self.values[index * len(self.keys) : (index + 1) * len(self.keys)]
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                numbers = [float(int(step)), float(when), start, *map(float, row)]
                heads.extend(numbers[:_HEAD])
                values.extend(numbers[_HEAD:])
        return heads, values


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

    Attributes:
        keys: The names of all series.
        markers: The markers ``start``, ``resume`` and ``close``.
        damaged: The lines whose checksum is wrong.
        offset: Where the next line begins.
    """

    def __init__(self, path: Path, select: Callable[[str], bool]) -> None:
        self.keys: dict[str, None] = {}  # an ordered set
        self.markers: list[Line] = []
        self.damaged: list[DamagedLine] = []
        self.offset = 0
        self._path = path
        self._select = select
        self._tables: dict[tuple[str, ...], _Table] = {}

    def update(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Read the lines that were appended since the last call; return whether there were any.

        Args:
            progress: Called after each block with the bytes read and the size of the file.

        Raises:
            OSError: The file cannot be read, or is no regular file.
        """
        begin = self.offset
        with open_regular(self._path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(self.offset)
            while lines := file.readlines(_BLOCK_BYTES):
                if not lines[-1].endswith(b"\n"):  # it is still written
                    lines.pop()
                self._add_lines(lines)
                if progress is not None:
                    progress(self.offset, size)
        return self.offset > begin

    def build(self) -> Columns:
        """Return the effective records of what was read."""
        tables = list(self._tables.values())
        starts = [table.column(_OFFSET).astype(np.int64) for table in tables]
        offsets = np.concatenate([np.empty(0, np.int64), *starts])
        order = np.argsort(offsets, kind="stable")
        steps, times = (
            np.concatenate([np.empty(0), *(table.column(number) for table in tables)])[order]
            for number in (_STEP, _TIME)
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
        tables: Sequence[_Table],
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
        begins = [marker for marker in self.markers if marker.event in _ATTEMPT_EVENTS]
        attempts = np.searchsorted([marker.start_offset for marker in begins], offsets)
        begun = np.array([np.nan, *(marker.time for marker in begins)])[attempts]
        is_first = np.append(True, np.diff(attempts) != 0)[: len(attempts)]
        seconds = times - np.where(is_first, begun, np.append(np.nan, times)[:-1])
        return np.where(seconds > 0, seconds, 0.0)

    def _add_lines(self, lines: Sequence[bytes]) -> None:
        tables, loads, offset, fields = self._tables, orjson.loads, self.offset, _count_fields(lines)
        keys: list[str] = []
        for raw in lines:
            start = offset
            offset += len(raw)
            try:
                entry = loads(raw)
                metrics = entry["metrics"]
                if list(metrics) != keys:
                    table = tables[tuple(metrics)]
                    keys, heads, values = table.keys, table.heads, table.values
                numbers = metrics.values()
                if len(entry) != fields:
                    raise ValueError  # noqa: TRY301 - the fast path has one way out
                heads += (entry["step"], entry["time"], start)
                values += numbers
            except (ValueError, KeyError, TypeError, AttributeError):
                self._add_irregular(raw, start)
        for table in tables.values():
            if table.heads:
                table.flush()
        self.offset = offset

    def _add_irregular(self, raw: bytes, start: int) -> None:
        """Add what is not a record with known keys and finite numbers."""
        line = decode(raw, start)
        if isinstance(line, DamagedLine):
            self.damaged.append(line)
        elif line is not None and line.event in _EVENTS:
            self.markers.append(line)
        elif line is not None and line.event is None and line.metrics:
            keys = tuple(line.metrics)
            if keys not in self._tables:
                self._tables[keys] = _Table(list(keys), self._select)
                self.keys.update(dict.fromkeys(keys))
            self._tables[keys].add(line)


def _count_fields(lines: Sequence[bytes]) -> int:
    """Return how many fields a record among these lines has if it is like all others: 3, or 4 with right checksums.

    0 means that the lines have to be checked one by one.
    """
    if all([raw[-3:] == b"}}\n" for raw in lines]):  # noqa: C419 - a list is faster
        return 3
    if not all([raw[-CHECKSUM_BYTES:_CHECKSUM] == CHECKSUM_FIELD for raw in lines]):  # noqa: C419
        return 0
    sums = b"".join([raw[_CHECKSUM:] for raw in lines])
    right = b"".join([b'%08x"}\n' % crc32(raw[:-CHECKSUM_BYTES]) for raw in lines])
    return 4 if sums == right else 0
