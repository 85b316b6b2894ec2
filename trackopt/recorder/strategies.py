"""Deliver a journal that was resumed, to a sink that truncates; `store_once` does it for others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from trackopt import journal
from trackopt.recorder.cursor import Cursor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.journal import DamagedLine, Line
    from trackopt.recorder.sinks.base import Sink

T = TypeVar("T")


class DeliveryStrategy(ABC):
    """Read the journal from a cursor for one open sink, and send what the sink does not have.

    Attributes:
        cursor: What the sink has stored.
    """

    def __init__(self, path: Path, sink: Sink, cursor: Cursor, notify: Callable[[str], None]) -> None:
        self.cursor = cursor
        self._path = path
        self._sink = sink
        self._notify = notify
        self._read_offset = cursor.replay_offset
        self._last_step_by_key = dict(cursor.last_step_by_key)
        self._status = cursor.status

    def deliver(self, until: int, batch_size: int) -> bool:
        """Send up to ``batch_size`` records before the offset ``until``; return whether there are more."""
        records: list[Line] = []
        damaged: list[DamagedLine] = []
        for line in journal.read(self._path, self._read_offset, damaged.append):
            if line.end_offset > until or len(records) >= batch_size:
                break
            if line.event in {"start", "resume"}:
                self._release(records)
                self._send(records)
                records = []
                self._begin(line)
                self._status = "RUNNING"
            elif line.event == "close":
                self._status = line.details["status"]
            elif line.event == "epoch":
                self._end_epoch(line, records)
            elif line.event is None:
                self._enqueue(line, records)
            self._read_offset = line.end_offset
        if damaged:
            self._notify(journal.describe_damage(self._path, damaged))
        self._send(records)
        return len(records) >= batch_size

    def finish(self) -> str:
        """Give the sink the run's final status, and return it."""
        status = self._final_status()
        self._sink.finish(status)
        return status

    @abstractmethod
    def _begin(self, marker: Line) -> None:
        """Handle the start or the resume of an attempt."""

    @abstractmethod
    def _observe(self, record: Line) -> None:
        """See each record that is read, whether it is sent or not."""

    @abstractmethod
    def _make_cursor(self) -> Cursor:
        """Return the cursor after everything read so far was stored."""

    def _release(self, records: list[Line]) -> None:
        """Add what is held back of the latest step, which is the last of an epoch or of an attempt."""

    def _end_epoch(self, marker: Line, records: list[Line]) -> None:
        """Handle the end of an epoch, whose last step may still get another line."""

    def _enqueue(self, line: Line, records: list[Line]) -> None:
        self._add_new(line, records)
        self._observe(line)

    def _add_new(self, line: Line, records: list[Line]) -> None:
        """Add the values that the sink does not have."""
        metrics = self._drop_already_sent(line.step, line.metrics)
        histograms = self._drop_already_sent(line.step, line.histograms, "histogram ")
        if metrics or histograms:
            records.append(replace(line, metrics=metrics, histograms=histograms))

    def _drop_already_sent(self, step: int, values: dict[str, T], prefix: str = "") -> dict[str, T]:
        """Return the values that the sink does not have, and count them as sent."""
        new = {key: value for key, value in values.items() if step > self._last_step_by_key.get(prefix + key, -1)}
        self._last_step_by_key |= {prefix + key: step for key in new}
        return new

    def _final_status(self) -> str:
        """Return the status of what was read: a training without a ``close`` marker was killed."""
        return "KILLED" if self._status == "RUNNING" else self._status

    def _send(self, records: list[Line]) -> None:
        if records:
            self._sink.write(records)
        self.cursor = self._make_cursor()


class TruncatingDelivery(DeliveryStrategy):
    """Deliver to a sink that can drop a step and everything after it.

    A sink reopened at the cursor has dropped ``replay_step`` and later steps, and receives them again.
    """

    def __init__(self, path: Path, sink: Sink, cursor: Cursor, notify: Callable[[str], None]) -> None:
        super().__init__(path, sink, cursor, notify)
        self._replay_offset, self._replay_step = cursor.replay_offset, cursor.replay_step
        self._max_step = cursor.replay_step
        self._truncate_sent(cursor.replay_step - 1)

    def _begin(self, marker: Line) -> None:
        if marker.event == "resume":
            self._rewind(marker)
        else:
            self._sink.begin(marker)

    def _observe(self, record: Line) -> None:
        if record.step > self._max_step:
            self._replay_offset = record.start_offset
            self._replay_step = self._max_step = record.step

    def _make_cursor(self) -> Cursor:
        return Cursor(
            offset=self._read_offset,
            replay_offset=self._replay_offset,
            replay_step=self._replay_step,
            last_step_by_key=dict(self._last_step_by_key),
            status=self._status,
        )

    def _rewind(self, marker: Line) -> None:
        """Truncate the sink to the history that it shares with the resumed run, and send the rest of that history.

        The shared history ends before the checkpoint's own step: records of that step that follow the resume may be
        delivered twice if the delivery is interrupted, and a sink can only drop a step as a whole.
        """
        restored = self._find_restored(marker)
        step = min((line.step for line in restored), default=marker.step + 1)
        self._truncate_sent(step - 1)
        self._replay_offset, self._replay_step, self._max_step = marker.start_offset, step, marker.step
        self._sink.begin(replace(marker, step=step - 1))
        records: list[Line] = []
        for line in restored:
            self._enqueue(line, records)
        self._send(records)

    def _find_restored(self, marker: Line) -> list[Line]:
        """Return the records of the marker's own step, and those that only an earlier resume had superseded.

        After a checkpoint of the latest attempt, they are the last records before it; only those are read.
        """
        offset = journal.checkpoint_offset(marker)
        restored: list[Line] = []
        for line in journal.read_backwards(self._path, marker.start_offset):
            is_before = line.start_offset < offset
            if line.event == "resume" and not (is_before and line.step < marker.step):
                return self._find_restored_anywhere(marker)
            if line.event in {"resume", None} and is_before and line.step < marker.step:
                break
            if line.event is None and is_before and line.step == marker.step:
                restored.append(line)
        return restored[::-1]

    def _find_restored_anywhere(self, marker: Line) -> list[Line]:
        lines = [
            replace(line, metrics={}, histograms={})  # the values of all lines may not fit into memory
            for line in journal.read(self._path)
            if line.start_offset < marker.start_offset and line.event in {"resume", None}
        ]
        before = {line.start_offset for line in journal.effective(lines)}
        after = journal.effective([*lines, marker])
        restored = {line.start_offset for line in after if line.start_offset not in before or line.step == marker.step}
        return [line for line in journal.read(self._path) if line.start_offset in restored] if restored else []

    def _truncate_sent(self, step: int) -> None:
        self._last_step_by_key = {key: min(sent, step) for key, sent in self._last_step_by_key.items()}
