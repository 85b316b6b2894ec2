"""Parse the lines of a long journal into tables of numbers."""

from __future__ import annotations

import contextlib
from array import array
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import orjson

from trackopt.journal.lines import CHECKSUM_BYTES, CHECKSUM_FIELD, MAX_STEP, DamagedLine, Line, crc32, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

STEP, TIME, OFFSET, _HEAD = range(4)  # the columns of a table before the metrics, and their number
ATTEMPT_EVENTS = ("start", "resume")
_BLOCK_BYTES = 1 << 18  # stays in a core's cache
_EVENTS = (*ATTEMPT_EVENTS, "close")
_CHECKSUM = len(CHECKSUM_FIELD) - CHECKSUM_BYTES


class Table:
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
            number: [] for number in (STEP, TIME, OFFSET, *self.numbers.values())
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
        is_valid = np.abs(columns[STEP]) < MAX_STEP
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

    def extend(self, later: Table) -> None:
        """Append the records of a table with the same keys, which are flushed."""
        for number, blocks in self._columns.items():
            blocks += later._columns[number]


class Tables:
    """The records of a journal from an offset on, by their keys.

    Args:
        select: Returns whether to keep a series.
        offset: Where the first line begins.

    Attributes:
        keys: The names of all series, in the order in which they appear.
        markers: The markers ``start``, ``resume`` and ``close``.
        damaged: The lines whose checksum is wrong.
        offset: Where the next line begins.
    """

    def __init__(self, select: Callable[[str], bool], offset: int = 0) -> None:
        self.keys: dict[str, None] = {}  # an ordered set
        self.markers: list[Line] = []
        self.damaged: list[DamagedLine] = []
        self.offset = offset
        self._select = select
        self._tables: dict[tuple[str, ...], Table] = {}

    def __iter__(self) -> Iterator[Table]:
        return iter(self._tables.values())

    def read(self, file: BinaryIO, end: int, progress: Callable[[int], None] = lambda _: None) -> None:
        """Add the complete lines of a journal from the offset on to ``end``, which is the end of a line or the file.

        Args:
            file: The journal.
            end: Where to stop.
            progress: Called with the new offset after each block.
        """
        file.seek(self.offset)
        while self.offset < end and (lines := file.readlines(min(_BLOCK_BYTES, end - self.offset))):
            if self.offset + sum(map(len, lines)) > end:  # `readlines` may read one more
                lines.pop()
            if not lines:
                return
            is_torn = not lines[-1].endswith(b"\n")  # it is still written
            self._add_lines(lines[:-1] if is_torn else lines)
            progress(self.offset)
            if is_torn:
                return

    def export(self) -> tuple[Any, ...]:
        """Return what another process needs for `extend`."""
        return self.keys, self.markers, self.damaged, self.offset, self._tables

    def extend(self, exported: tuple[Any, ...]) -> None:
        """Add the following part of the journal, which another process has read."""
        keys, markers, damaged, self.offset, tables = exported
        self.keys.update(keys)
        self.markers += markers
        self.damaged += damaged
        for names, table in tables.items():
            if names in self._tables:
                self._tables[names].extend(table)
            else:
                self._tables[names] = table

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
                    raise ValueError
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
                self._tables[keys] = Table(list(keys), self._select)
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
