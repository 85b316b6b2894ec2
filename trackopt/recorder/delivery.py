"""Delivery of a journal to one sink: what was sent, what comes next, and what a resume changes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.journal import Line
    from trackopt.recorder.sink import Sink

T = TypeVar("T")
_RECORDS = 500  # in one write to a sink


class Delivery:
    """One sink and its cursor into the journal.

    The cursor says how far the sink has everything: the journal's ``offset``, and for each key the last step whose
    value was ``sent`` (histograms count apart), so that what a resumed run records once more is not sent again. It
    moves only after the sink has taken the records. In a sink that rewinds it stays at the beginning of the last step:
    when delivery starts again there, the sink drops that step and takes it anew.

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
        self.cursor = cursor or {"offset": 0, "step": 0, "sent": {}, "status": "RUNNING", "finished": False}

    def pump(self, limit: int) -> bool:
        """Send the next records, as far as the journal's offset ``limit``; whether there are more.

        Whatever the sink raises comes through, and the cursor stays where it was.
        """
        if self.cursor["offset"] >= limit:
            return False
        try:
            return self._pump(self._sink or self._open(), limit)
        except BaseException:
            self.close()  # it is made again, from the cursor
            raise

    def finish(self) -> None:
        """Tell the sink how the run ended: one that neither closed nor stopped was killed."""
        if self.cursor["finished"]:
            return
        sink = self._sink or self._open()
        status = "KILLED" if self._status == "RUNNING" else self._status
        sink.finish(status)
        self.close()
        self.cursor |= {"offset": self._read, "status": status, "finished": True}

    def close(self) -> None:
        """Let go of the sink."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def _open(self) -> Sink:
        cursor = self.cursor
        self._sink = sink = self._connect(cursor["step"])
        self._sent: dict[str, int] = dict(cursor["sent"])
        self._status: str = cursor["status"]
        self._read: int = cursor["offset"]
        self._first: tuple[int, int] = (cursor["offset"], cursor["step"])  # where the step being read begins
        self._replaced: dict[int, dict[str, float]] = {}
        if sink.rewinds:
            self._forget_after(cursor["step"] - 1)
        return sink

    def _pump(self, sink: Sink, limit: int) -> bool:
        records: list[Line] = []
        for line in journal.read(self._path, self._read):
            if line.end > limit or len(records) >= _RECORDS:
                break
            if line.event in {"start", "resume"}:
                self._send(sink, records)
                records = []
                self._begin(sink, line)
            elif line.event == "close":
                self._status = line.details["status"]
            elif line.event is None:
                self._take(sink, line, records)
            self._read = line.end
        self._send(sink, records)
        return len(records) >= _RECORDS

    def _take(self, sink: Sink, line: Line, records: list[Line]) -> None:
        if line.step != self._first[1]:
            self._first = (line.start, line.step)
        metrics = self._unsent(line.step, line.metrics)
        histograms = self._unsent(line.step, line.histograms, "histogram ")
        if metrics or histograms:
            records.append(dataclasses.replace(line, metrics=metrics, histograms=histograms))
        before = self._replaced.get(line.step, {})
        if any(repr(before.get(key, value)) != repr(value) for key, value in line.metrics.items()):
            self._replaced = {}
            sink.diverged(line.step)
            self._tell(f"the resumed run differs from the one before it, first at step {line.step}")

    def _unsent(self, step: int, values: dict[str, T], kind: str = "") -> dict[str, T]:
        """The values that the sink has not been given yet; from here on they count as sent."""
        new = {key: value for key, value in values.items() if step > self._sent.get(kind + key, -1)}
        self._sent |= {kind + key: step for key in new}
        return new

    def _send(self, sink: Sink, records: list[Line]) -> None:
        if records:
            sink.write(records)
        offset, step = self._first if sink.rewinds else (self._read, self._first[1])
        self.cursor = {
            "offset": offset,
            "step": step,
            "sent": dict(self._sent),
            "status": self._status,
            "finished": False,
        }

    def _begin(self, sink: Sink, marker: Line) -> None:
        self._status = "RUNNING"
        if marker.event == "resume" and sink.rewinds:
            self._rewind(sink, marker)
            return
        if marker.event == "resume":
            self._first = (marker.end, marker.step + 1)
            self._replaced = self._superseded(marker)
        sink.begin(marker)

    def _rewind(self, sink: Sink, marker: Line) -> None:
        """Let the sink go back to where the resumed history leaves what it holds, and give it that history again."""
        again = self._revived(marker)
        back = min((line.step for line in again), default=marker.step + 1) - 1
        self._forget_after(back)
        sink.begin(dataclasses.replace(marker, step=back))
        records: list[Line] = []
        for line in again:
            self._take(sink, line, records)
        self._first = (marker.end, marker.step + 1)
        self._send(sink, records)

    def _revived(self, marker: Line) -> list[Line]:
        """The records that an earlier resume had put out of force, and that this one counts again."""
        places = [
            dataclasses.replace(line, metrics={}, histograms={})  # all of them may be too much for the memory
            for line in journal.read(self._path)
            if line.start < marker.start and line.event in {"resume", None}
        ]
        before = {line.start for line in journal.effective(places)}
        again = {line.start for line in journal.effective([*places, marker])} - before
        return [line for line in journal.read(self._path) if line.start in again] if again else []

    def _superseded(self, marker: Line) -> dict[int, dict[str, float]]:
        """What was recorded, and perhaps sent, of the steps that a resumed run will take again."""
        found: dict[int, dict[str, float]] = {}
        for line in journal.effective(
            line
            for line in journal.read(self._path)
            if line.start < marker.start and (line.event == "resume" or journal.superseded(line, marker))
        ):
            found.setdefault(line.step, {}).update(line.metrics)
        return found

    def _forget_after(self, step: int) -> None:
        self._sent = {key: min(sent, step) for key, sent in self._sent.items()}
