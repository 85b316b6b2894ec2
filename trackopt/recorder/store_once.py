"""Deliver a journal that was resumed to a sink that stores each point once, and takes none back."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.recorder.cursor import Cursor
from trackopt.recorder.strategies import DeliveryStrategy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.journal import Line
    from trackopt.recorder.sinks.base import Sink


class StoreOnceDelivery(DeliveryStrategy):
    """Deliver to a sink that stores a repeated record once, and can take back none.

    Steps that a resumed run repeats are not sent again. They are compared with the superseded ones instead: the first
    difference is reported. A training that starts over is a run of its own: all of its steps are sent.

    With ``mlflow_every=n`` the sink receives of each metric the first point in each n steps (steps 1, 1 + n, … of a
    metric that every step has), and all points of the last step of an epoch or of an attempt. What is not due of a step
    is held back until the next line shows whether it is such a step.
    """

    def __init__(self, path: Path, sink: Sink, cursor: Cursor, notify: Callable[[str], None]) -> None:
        super().__init__(path, sink, cursor, notify)
        self._resume_offset = cursor.resume_offset
        self._every = cursor.every
        self._held: list[Line] = []  # the lines of one step, perhaps with the marker of its epoch's end
        self._superseded_metrics: dict[int, dict[str, float]] = {}
        if cursor.resume_offset is not None:
            self._superseded_metrics = self._read_superseded(next(journal.read(path, cursor.resume_offset)))

    def _begin(self, marker: Line) -> None:
        if marker.details.get("starts_over"):
            self._sink.start_over(self._final_status())
            self._last_step_by_key, self._superseded_metrics, self._resume_offset = {}, {}, None
        elif marker.event == "resume":
            self._superseded_metrics = self._read_superseded(marker)
            self._resume_offset = marker.start_offset
        self._every = marker.details.get("mlflow_every", 1)
        self._sink.begin(marker)

    def finish(self) -> str:
        """Send what is held back of the last step, then the final status; return it."""
        records: list[Line] = []
        self._release(records)
        self._send(records)
        return super().finish()

    def _release(self, records: list[Line]) -> None:
        for line in self._held:
            self._add_new(line, records)
        self._held = []

    def _end_epoch(self, marker: Line, records: list[Line]) -> None:
        self._release(records)
        self._held = [marker]

    def _enqueue(self, line: Line, records: list[Line]) -> None:
        if self._held and self._held[0].step != line.step:
            self._held = []
        if self._every == 1 or any(held.event == "epoch" for held in self._held):
            self._add_new(line, records)
        else:
            due = {key: value for key, value in line.metrics.items() if self._is_due(key, line.step)}
            self._add_new(replace(line, metrics=due), records)
            self._held.append(line)
        self._observe(line)

    def _is_due(self, key: str, step: int) -> bool:
        sent = self._last_step_by_key.get(key)
        return sent is None or (step - 1) // self._every > (sent - 1) // self._every

    def _observe(self, record: Line) -> None:
        """Compare a record with the one that it supersedes, up to the last of those."""
        if self._resume_offset is None:
            return
        superseded = self._superseded_metrics.get(record.step, {})
        if any(repr(superseded.get(key, value)) != repr(value) for key, value in record.metrics.items()):
            self._sink.diverged(record.step)
            self._notify(f"the resumed run differs from the previous attempt, first at step {record.step}")
        elif record.step <= next(reversed(self._superseded_metrics), 0):
            return
        self._superseded_metrics, self._resume_offset = {}, None

    def _make_cursor(self) -> Cursor:
        offset = self._held[0].start_offset if self._held else self._read_offset
        return Cursor(
            offset=offset,
            replay_offset=offset,
            last_step_by_key=dict(self._last_step_by_key),
            resume_offset=self._resume_offset,
            every=self._every,
            status=self._status,
        )

    def _read_superseded(self, marker: Line) -> dict[int, dict[str, float]]:
        """Return the metrics, by step, of the records that a resume superseded; some may not have been sent."""
        metrics: dict[int, dict[str, float]] = {}
        for line in self._list_superseded(marker):
            metrics.setdefault(line.step, {}).update(line.metrics)
        return metrics

    def _list_superseded(self, marker: Line) -> list[Line]:
        """Return the records that counted until a resume; what follows the checkpoint is read, if that suffices."""
        offset = journal.checkpoint_offset(marker)
        if math.isfinite(offset):
            later = self._read_until(marker, int(offset))
            if all(line.event != "resume" for line in later):  # it is a checkpoint of the latest attempt
                return [line for line in later if line.event is None]
        lines = self._read_until(marker, 0)
        return journal.effective(line for line in lines if line.event or journal.superseded(line, marker))

    def _read_until(self, marker: Line, offset: int) -> list[Line]:
        """Return the records and resumes between an offset and a marker."""
        lines = takewhile(lambda line: line.start_offset < marker.start_offset, journal.read(self._path, offset))
        return [line for line in lines if line.event in {"resume", None}]
