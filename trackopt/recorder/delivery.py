"""Delivery of a journal to one sink: what was sent, what comes next, and what a resume changes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.journal import Line
    from trackopt.recorder.sinks.base import Sink

T = TypeVar("T")
_RECORDS = 500  # in one write to a sink, unless it fails


class Delivery:
    """One sink and its cursor into the journal.

    The cursor says how far the sink has everything: the journal's ``offset``, and for each key the last step whose
    value was ``sent`` (histograms count apart), so that what a resumed run records once more is not sent again. It
    moves only after the sink has taken the records, so a delivery that broke off gives the sink some of them twice. A
    sink that rewinds is therefore made anew at ``step``, which it drops with all that follows, and is given everything
    again from where that step ``begins`` in the journal; any other must store a record that comes twice once.

    Args:
        path: The journal's file.
        connect: Makes the sink, given the first step of what it will get.
        cursor: Where an earlier delivery stopped.
        tell: Called with a line that the user should see.
    """

    def __init__(
        self,
        path: Path,
        connect: Callable[[int], Sink],
        cursor: dict[str, Any] | None,
        tell: Callable[[str], None],
    ) -> None:
        self._path = path
        self._connect = connect
        self._tell = tell
        self._sink: Sink | None = None
        self._size = _RECORDS
        self.cursor: dict[str, Any] = {
            "offset": 0,
            "begins": 0,
            "step": 0,
            "sent": {},
            "resumed": None,
            "status": "RUNNING",
            "finished": False,
            **(cursor or {}),
        }

    def deliver(self, limit: int) -> bool:
        """Send the next records, as far as the journal's offset ``limit``; whether there are more.

        Whatever the sink raises comes through, and the cursor stays where it was.
        """
        if self.cursor["offset"] >= limit:
            return False
        try:
            more = self._pump(self._sink or self._open(), limit)
        except BaseException:
            self._size = max(1, self._size // 4)  # a slow server may take fewer of them before the time is up
            self.close()  # it is made again, from the cursor
            raise
        self._size = min(2 * self._size, _RECORDS)
        return more

    def finish(self) -> None:
        """Tell the sink how the run ended: one that neither closed nor stopped was killed."""
        if self.cursor["finished"]:
            return
        sink = self._sink or self._open()
        status = "KILLED" if self._status == "RUNNING" else self._status
        try:
            sink.finish(status)
        finally:
            self.close()
        self.cursor = {**self.cursor, "status": status, "finished": True}

    def close(self) -> None:
        """Let go of the sink."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.close()

    def _open(self) -> Sink:
        cursor = self.cursor
        self._sink = sink = self._connect(cursor["step"])
        self._sent: dict[str, int] = dict(cursor["sent"])
        self._status: str = cursor["status"]
        self._read: int = cursor["begins"]
        self._replay_from: tuple[int, int] = (cursor["begins"], cursor["step"])  # where a sink that is made anew begins
        self._replay_step: int = cursor["step"]  # a record behind this step moves that place on
        self._resumed: int | None = cursor["resumed"]  # the marker whose steps may be recorded once more
        self._superseded_values: dict[int, dict[str, float]] = {}
        if sink.supports_truncation:
            self._truncate_sent(cursor["step"] - 1)
        elif self._resumed is not None:
            self._superseded_values = self._superseded(next(journal.read(self._path, self._resumed)))
        return sink

    def _pump(self, sink: Sink, limit: int) -> bool:
        records: list[Line] = []
        for line in journal.read(self._path, self._read):
            if line.end_offset > limit or len(records) >= self._size:
                break
            if line.event in {"start", "resume"}:
                self._send(sink, records)
                records = []
                self._begin(sink, line)
            elif line.event == "close":
                self._status = line.details["status"]
            elif line.event is None:
                self._enqueue(sink, line, records)
            self._read = line.end_offset
        self._send(sink, records)
        return len(records) >= self._size

    def _enqueue(self, sink: Sink, line: Line, records: list[Line]) -> None:
        if line.step > self._replay_step:
            self._replay_from, self._replay_step = (line.start_offset, line.step), line.step
        metrics = self._drop_already_sent(line.step, line.metrics)
        histograms = self._drop_already_sent(line.step, line.histograms, "histogram ")
        if metrics or histograms:
            records.append(dataclasses.replace(line, metrics=metrics, histograms=histograms))
        if self._resumed is not None:
            self._compare(sink, line)

    def _compare(self, sink: Sink, line: Line) -> None:
        """Tell the first step at which a resumed run measures what the one before it did not."""
        before = self._superseded_values.get(line.step, {})
        if any(repr(before.get(key, value)) != repr(value) for key, value in line.metrics.items()):
            sink.diverged(line.step)
            self._tell(f"the resumed run differs from the one before it, first at step {line.step}")
        elif line.step <= next(reversed(self._superseded_values), 0):
            return
        self._superseded_values, self._resumed = {}, None

    def _drop_already_sent(self, step: int, values: dict[str, T], kind: str = "") -> dict[str, T]:
        """The values that the sink has not been given yet; from here on they count as sent."""
        new = {key: value for key, value in values.items() if step > self._sent.get(kind + key, -1)}
        self._sent |= {kind + key: step for key in new}
        return new

    def _send(self, sink: Sink, records: list[Line]) -> None:
        if records:
            sink.write(records)
        begins, step = self._replay_from
        self.cursor = {
            "offset": self._read,
            "begins": begins if sink.supports_truncation else self._read,
            "step": step,
            "sent": dict(self._sent),
            "resumed": self._resumed,
            "status": self._status,
            "finished": False,
        }

    def _begin(self, sink: Sink, marker: Line) -> None:
        self._status = "RUNNING"
        if marker.event == "resume" and sink.supports_truncation:
            self._rewind(sink, marker)
            return
        if marker.event == "resume":
            self._replay_from, self._replay_step = (marker.end_offset, marker.step + 1), marker.step
            self._superseded_values, self._resumed = self._superseded(marker), marker.start_offset
        sink.begin(marker)

    def _rewind(self, sink: Sink, marker: Line) -> None:
        """Let the sink go back to where the resumed history leaves what it holds, and give it that history again.

        That is the checkpoint's own step at the latest: what is logged for it after the resume comes twice where this
        is broken off, and then the sink has to drop the step as a whole.
        """
        again = self._restored_records(marker)
        step = min((line.step for line in again), default=marker.step + 1)
        self._truncate_sent(step - 1)
        self._replay_from, self._replay_step = (marker.start_offset, step), marker.step
        sink.begin(dataclasses.replace(marker, step=step - 1))
        records: list[Line] = []
        for line in again:
            self._enqueue(sink, line, records)
        self._send(sink, records)

    def _restored_records(self, marker: Line) -> list[Line]:
        """The records of the marker's own step, and those that an earlier resume had put out of force."""
        places = [
            dataclasses.replace(line, metrics={}, histograms={})  # all of them may be too much for the memory
            for line in journal.read(self._path)
            if line.start_offset < marker.start_offset and line.event in {"resume", None}
        ]
        before = {line.start_offset for line in journal.effective(places)}
        after = journal.effective([*places, marker])
        again = {line.start_offset for line in after if line.start_offset not in before or line.step == marker.step}
        return [line for line in journal.read(self._path) if line.start_offset in again] if again else []

    def _superseded(self, marker: Line) -> dict[int, dict[str, float]]:
        """What was recorded, and perhaps sent, of the steps that a resumed run will take again."""
        found: dict[int, dict[str, float]] = {}
        for line in journal.effective(
            line
            for line in journal.read(self._path)
            if line.start_offset < marker.start_offset and (line.event == "resume" or journal.superseded(line, marker))
        ):
            found.setdefault(line.step, {}).update(line.metrics)
        return found

    def _truncate_sent(self, step: int) -> None:
        self._sent = {key: min(sent, step) for key, sent in self._sent.items()}
