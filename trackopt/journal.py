"""The journal: one JSON line for each step, in ``metrics.jsonl``, appended and never changed.

It is the only thing that telemetry writes in the training process; everything else (TensorBoard, MLflow, plots) is
made from it. A line is one ``write(2)``, so what was written survives the death of the process. There are two kinds:

* records, ``{"step": 1, "time": 1763717000.1, "metrics": {"loss": 0.69, "lr/group0": 0.1}}``
* markers, ``{"event": "start" | "resume" | "checkpoint" | "stop" | "close", "step": 100, "time": …, …}``

A ``resume`` marker at step k says that training went back to step k: what an earlier attempt recorded after it is
superseded. The *effective* series are what is left. Non-finite numbers are the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``, since JSON has no others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from trackopt.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

NAME = "metrics.jsonl"

logger = logging.getLogger("trackopt")


@dataclass(frozen=True)
class Histogram:
    """How often which values occur.

    Attributes:
        limits: The upper limit of each bucket, ascending.
        counts: How many values are in it.
        min: The smallest value.
        max: The largest.
        sum: The sum of all values.
        sum_squares: The sum of their squares.
        num: How many there are.
    """

    limits: list[float]
    counts: list[float]
    min: float
    max: float
    sum: float
    sum_squares: float
    num: float


@dataclass(frozen=True)
class Line:
    """One line of a journal: a record (it has metrics or histograms) or a marker (it has an event).

    Attributes:
        step: The optimizer step that it belongs to.
        time: Unix seconds.
        metrics: The numbers of a record; empty in a marker.
        event: A marker's kind; ``None`` in a record.
        details: What else a marker says.
        start_offset: The line's offset in the file, in bytes.
        end_offset: The offset behind its newline.
        histograms: What a record of histograms holds, by names like ``exp_avg/group0``; it has no metrics.
    """

    step: int
    time: float
    metrics: dict[str, float] = field(default_factory=dict)
    event: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    start_offset: int = 0
    end_offset: int = 0
    histograms: dict[str, Histogram] = field(default_factory=dict)


class Journal:
    """The writing end, held by the training process.

    What cannot be written (a full disk) is kept in memory, told once, and written as soon as that works again.

    Args:
        path: The journal's file; it is created if need be.

    Raises:
        RunError: The file cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""
        self._warned = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._file).st_size
            torn = self._size and os.pread(self._file, 1, self._size - 1) != b"\n"
        except OSError as error:
            raise RunError(
                f"{path}: cannot open the journal ({error.strerror}); check the directory's permissions"
            ) from error
        if torn:
            self._write(b"\n")  # ends the line that a killed process left torn, so that it spoils no other

    @property
    def offset(self) -> int:
        """Where the next line begins, in bytes, once those that wait are written."""
        return self._size + len(self._unwritten)

    def record(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        """Append what was measured at ``step``, ``at`` this time in Unix seconds; default: now."""
        self._append({"step": step, "time": at or time.time(), "metrics": _encode_nonfinite(metrics)})

    def histograms(self, step: int, histograms: Mapping[str, Any]) -> None:
        """Append how tensors were spread at ``step``: each as a `Histogram`, or a dict of its fields."""
        self._append({"step": step, "time": time.time(), "histograms": histograms})

    def mark(self, event: str, step: int, **details: Any) -> None:
        """Append a marker."""
        self._append({"event": event, "step": step, "time": time.time(), **details})

    def sync(self) -> None:
        """Force what was appended to the disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; lines that a full disk still keeps out are lost, and told."""
        self._write(b"")
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            logger.warning("trackopt: %d lines of %s could not be written and are lost", lines, self.path)
        try:
            os.close(self._file)
        except OSError as error:  # a file system over the network may write only now
            logger.warning("trackopt: the last lines of %s may be lost (%s)", self.path, error.strerror)

    def _append(self, line: dict[str, Any]) -> None:
        self._write(orjson.dumps(line) + b"\n")

    def _write(self, data: bytes) -> None:
        data = self._unwritten + data
        try:
            while data:
                written = os.write(self._file, data)
                self._size += written
                data = data[written:]
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "trackopt: cannot write %s (%s); training goes on, the lines are kept until it works",
                    self.path,
                    error.strerror,
                )
                self._warned = True
        else:
            self._warned = False
        self._unwritten = data


_SPELLINGS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _encode_nonfinite(metrics: Mapping[str, float]) -> Mapping[str, float | str]:
    if all(map(math.isfinite, metrics.values())):
        return metrics
    return {key: value if math.isfinite(value) else _SPELLINGS[str(value)] for key, value in metrics.items()}


def read(path: Path, offset: int = 0) -> Iterator[Line]:
    """The complete lines of a journal from ``offset`` on, in order.

    A torn line is skipped, and so is one that says nothing that this version knows. The last line counts only once
    its newline is there, so a journal that is being written can be read at any moment.

    Args:
        path: The journal's file; a missing one has no lines.
        offset: Where to begin, in bytes: 0, or the ``end_offset`` of a line read before.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            line = _parse(raw, offset)
            offset += len(raw)
            if line is not None:
                yield line


def effective(lines: Iterable[Line]) -> list[Line]:
    """The records that count, in the order of their steps: those of abandoned futures are left out.

    They are the history of the checkpoint that the latest attempt went on from, then its own. A step has one record;
    one that follows an epoch (a validation loss) is a second line of the same step.

    Example:
        >>> effective([Line(1, 0.0, {"loss": 2.0}), Line(2, 0.0, {"loss": 1.5}),
        ...            Line(1, 0.0, event="resume"), Line(2, 0.0, {"loss": 1.4})])[-1].metrics
        {'loss': 1.4}
    """
    seen: list[Line] = []
    kept: list[Line] = []
    resumed = 0  # where the latest attempt begins
    for line in lines:
        if line.event == "resume":
            offset = line.details.get("offset", math.inf)
            if offset < resumed:  # the checkpoint is of an attempt that was given up: what was recorded there is back
                kept = effective(each for each in seen if each.start_offset < offset)
            kept = [record for record in kept if not superseded(record, line)]
            resumed = line.start_offset
        elif line.event is None:
            kept.append(line)
        if line.event in {"resume", None}:
            seen.append(line)
    return kept


def superseded(record: Line, resume: Line) -> bool:
    """Whether a record from before a ``resume`` marker belongs to the future that it abandoned.

    The marker's ``offset`` is where the journal stood when the checkpoint was taken: it tells what was logged at the
    checkpoint's own step, but after it.
    """
    return record.step > resume.step or record.start_offset >= resume.details.get("offset", math.inf)


def series(path: Path | str) -> dict[str, list[tuple[int, float]]]:
    """The effective series of a run: for each key its points ``(step, value)``.

    Args:
        path: A run's directory, or its ``metrics.jsonl``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "metrics.jsonl")
        ...     journal.record(1, {"loss": 0.5})
        ...     journal.close()
        ...     series(folder)
        {'loss': [(1, 0.5)]}
    """
    path = Path(path)
    points: dict[str, list[tuple[int, float]]] = {}
    for line in effective(read(path / NAME if path.is_dir() else path)):
        for key, value in line.metrics.items():
            points.setdefault(key, []).append((line.step, value))
    return points


def _parse(raw: bytes, start: int) -> Line | None:
    try:
        entry = orjson.loads(raw)
        step, when = int(entry.pop("step")), float(entry.pop("time"))
        event = entry.pop("event", None)
        metrics = {key: float(value) for key, value in entry.pop("metrics", {}).items()}
        histograms = {key: _histogram(**value) for key, value in entry.pop("histograms", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Line(step, when, metrics, event, entry, start, start + len(raw), histograms)


def _histogram(limits: list[float], counts: list[float], **numbers: float) -> Histogram:
    numbers = {name: float(number) for name, number in numbers.items()}
    return Histogram([float(limit) for limit in limits], [float(count) for count in counts], **numbers)
