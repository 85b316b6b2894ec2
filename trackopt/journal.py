"""The journal: one JSON line per step in the append-only file ``metrics.jsonl``.

It is the only file that telemetry writes in the training process; everything else (TensorBoard, MLflow, plots) is
derived from it. A line is one ``write(2)``, so it survives the death of the process. There are two kinds of lines:

* records, ``{"step": 1, "time": 1763717000.1, "metrics": {"loss": 0.69, "lr/group0": 0.1}}``
* markers, ``{"event": "start", "step": 0, "time": …, …}``. The events are ``start``, ``resume``, ``checkpoint``,
  ``checkpoint_failed``, ``nonfinite``, ``measurement_failed``, ``stop`` and ``close``; readers ignore others.

``measurement_failed`` says that a part of the telemetry ends at this step, because it failed: ``{"part": "statistics",
"error": "RuntimeError: …", "optimizer": "optimizer", "optimizer_class": "AdamW"}``. A part that concerns no optimizer,
such as the scheduler check, lacks the last two keys.

A ``resume`` marker at step k means that training went back to step k: later records of earlier attempts are superseded.
With ``"starts_over": true`` another training begins at step 0, and MLflow has it as a run of its own.
The *effective* series are the others. Non-finite numbers are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``,
since JSON has no such numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from trackopt.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


NAME = "metrics.jsonl"
_BINARY = getattr(os, "O_BINARY", 0)  # a flag of `os.open`: Windows would translate line ends

logger = logging.getLogger("trackopt")


@dataclass(frozen=True)
class Histogram:
    """The distribution of some values.

    Attributes:
        limits: The upper limit of each bucket, ascending.
        counts: The number of values in each bucket.
        min: The smallest value.
        max: The largest.
        sum: The sum of all values.
        sum_squares: The sum of their squares.
        num: The number of values.
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
        step: Its optimizer step.
        time: Unix seconds.
        metrics: The numbers of a record; empty in a marker.
        event: The event of a marker; ``None`` in a record.
        details: The other fields of a marker.
        start_offset: The line's offset in the file, in bytes.
        end_offset: The offset after its newline.
        histograms: The histograms of a record without metrics, by names like ``exp_avg/group0``.
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

    Lines that cannot be written (a full disk) are kept in memory with one warning, and written as soon as possible.

    Args:
        path: The journal's file; it is created if missing.

    Raises:
        RunError: The file cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""
        self._warned = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o644)
            self._size = os.fstat(self._file).st_size
            os.lseek(self._file, max(0, self._size - 1), os.SEEK_SET)
            is_torn = self._size and os.read(self._file, 1) != b"\n"
        except OSError as error:
            raise RunError(
                f"{path}: cannot open the journal ({error.strerror}); check the directory's permissions"
            ) from error
        if is_torn:
            self._write(b"\n")  # ends the incomplete line of a killed process

    @property
    def offset(self) -> int:
        """The offset of the next line in bytes, once all lines are written."""
        return self._size + len(self._unwritten)

    def record(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        """Append the metrics of a step, measured ``at`` a time in Unix seconds (default: now)."""
        is_finite = math.isfinite(sum(metrics.values()))
        values = metrics if is_finite else _encode_nonfinite(metrics)
        self._write(_encode({"step": step, "time": at or time.time(), "metrics": values}))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Append the histograms of a step."""
        self._write(_encode({"step": step, "time": time.time(), "histograms": histograms}))

    def mark(self, event: str, step: int, **details: Any) -> None:
        """Append a marker."""
        self._write(_encode({"event": event, "step": step, "time": time.time(), **details}))

    def sync(self) -> None:
        """Flush all written lines to the disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; warns about lines that could not be written, and are lost."""
        self._write(b"")
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            logger.warning("trackopt: %d lines of %s could not be written and are lost", lines, self.path)
        try:
            os.close(self._file)
        except OSError as error:  # a network file system may write only now
            logger.warning("trackopt: the last lines of %s may be lost (%s)", self.path, error.strerror)

    def _write(self, data: bytes) -> None:
        data = self._unwritten + data if self._unwritten else data
        try:
            while data:
                written = os.write(self._file, data)
                self._size += written
                data = data[written:]
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "trackopt: cannot write %s (%s); training continues, the lines are kept until it works",
                    self.path,
                    error.strerror,
                )
                self._warned = True
        else:
            self._warned = False
        self._unwritten = data


def _encode(line: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a name that is not text: a path may hold other bytes
        return json.dumps(line, ensure_ascii=False, default=asdict).encode(errors="replace") + b"\n"


_NONFINITE_SPELLINGS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _encode_nonfinite(metrics: Mapping[str, float]) -> Mapping[str, float | str]:
    return {key: value if math.isfinite(value) else _NONFINITE_SPELLINGS[str(value)] for key, value in metrics.items()}


def read(path: Path, offset: int = 0) -> Iterator[Line]:
    """Yield the complete lines of a journal from ``offset`` on, in order.

    Torn lines and lines that this version does not know are skipped. The last line counts only once its newline is
    written, so the journal of a running training can be read at any time.

    Args:
        path: The journal's file; a missing one has no lines.
        offset: The offset of the first line in bytes: 0, or the ``end_offset`` of an earlier line.
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
    """Return the records that are not superseded, in the order of their steps.

    They are the history of the checkpoint that the latest attempt resumed from, followed by its own. A step has one
    record; metrics that are logged after it (a validation loss) are a second line of the same step.

    Example:
        >>> effective([Line(1, 0.0, {"loss": 2.0}), Line(2, 0.0, {"loss": 1.5}),
        ...            Line(1, 0.0, event="resume"), Line(2, 0.0, {"loss": 1.4})])[-1].metrics
        {'loss': 1.4}
    """
    seen: list[Line] = []
    kept: list[Line] = []
    attempt_start = 0  # the offset at which the latest attempt begins
    for line in lines:
        if line.event == "resume":
            offset = line.details.get("offset", math.inf)
            if offset < attempt_start:  # the checkpoint of an abandoned attempt: the records before it count again
                kept = effective(earlier for earlier in seen if earlier.start_offset < offset)
            kept = [record for record in kept if not superseded(record, line)]
            attempt_start = line.start_offset
        elif line.event is None:
            kept.append(line)
        if line.event in {"resume", None}:
            seen.append(line)
    return kept


def superseded(record: Line, resume: Line) -> bool:
    """Return whether a record from before a ``resume`` marker is superseded by it.

    The marker's ``offset`` is the length of the journal when the checkpoint was taken: records of the checkpoint's own
    step that were logged after the checkpoint are superseded as well.
    """
    return record.step > resume.step or record.start_offset >= resume.details.get("offset", math.inf)


def series(path: Path | str) -> dict[str, list[tuple[int, float]]]:
    """Return the effective series of a run: for each key its points ``(step, value)``.

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
    result: dict[str, list[tuple[int, float]]] = {}
    for line in effective(read(path / NAME if path.is_dir() else path)):
        for key, value in line.metrics.items():
            result.setdefault(key, []).append((line.step, value))
    return result


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
