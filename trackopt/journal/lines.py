"""The lines of a journal: encode and decode one, with its checksum."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

try:
    from isal.isal_zlib import crc32  # twice as fast as zlib's
except ImportError:  # no wheel for this platform
    crc32 = zlib.crc32

__all__ = [
    "CHECKSUM_BYTES",
    "CHECKSUM_FIELD",
    "MAX_STEP",
    "NAME",
    "DamagedLine",
    "Histogram",
    "Line",
    "crc32",
    "decode",
    "encode",
    "encode_nonfinite",
]

NAME = "metrics.jsonl"
CHECKSUM_FIELD = b',"crc":"'
CHECKSUM_BYTES = len(CHECKSUM_FIELD) + len('01234567"}\n')  # at the end of a line
_END = b'"}\n'
_MIN_SIMILAR = 6  # bytes of the field's name and punctuation that are right, if only a few are damaged
MAX_STEP = 1 << 53  # below it floats hold integers exactly
_NONFINITE_SPELLINGS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


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


@dataclass(frozen=True)
class DamagedLine:
    """A line whose checksum is wrong; readers skip it.

    Attributes:
        start_offset: The line's offset in the file, in bytes.
        may_be_marker: False if it is a record for certain.
    """

    start_offset: int
    may_be_marker: bool


def encode(entry: dict[str, Any]) -> bytes:
    r"""Return a line with its checksum: the CRC-32 of all bytes before the field ``crc``, which is the last one.

    Example:
        >>> encode({"step": 1, "time": 2.5, "metrics": {}})
        b'{"step":1,"time":2.5,"metrics":{},"crc":"851d0c60"}\n'
    """
    try:
        content = orjson.dumps(entry)[:-1]
    except TypeError:  # a name that is not text: a path may hold other bytes
        content = json.dumps(entry, ensure_ascii=False, default=asdict).encode(errors="replace")[:-1]
    return b'%b,"crc":"%08x"}\n' % (content, crc32(content))


def encode_nonfinite(metrics: Mapping[str, float]) -> Mapping[str, float | str]:
    """Return metrics with NaN and infinite values as strings, since JSON has no such numbers."""
    return {key: value if math.isfinite(value) else _NONFINITE_SPELLINGS[str(value)] for key, value in metrics.items()}


def decode(raw: bytes, start: int) -> Line | DamagedLine | None:
    """Return what a complete line says; ``None`` if it is torn, empty or of an unknown kind.

    Args:
        raw: The line with its newline.
        start: Its offset in the file.
    """
    if not has_right_checksum(raw):
        is_record = raw.startswith(b'{"step":') and b'"event"' not in raw
        return DamagedLine(start, may_be_marker=not is_record)
    try:
        entry = orjson.loads(raw)
        step, when = int(entry.pop("step")), float(entry.pop("time"))
        event = entry.pop("event", None)
        metrics = {key: float(value) for key, value in entry.pop("metrics", {}).items()}
        histograms = {key: _histogram(**value) for key, value in entry.pop("histograms", {}).items()}
        entry.pop("crc", None)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    if abs(step) >= MAX_STEP or not (event is None or isinstance(event, str)):
        return None
    return Line(step, when, metrics, event, entry, start, start + len(raw), histograms)


def has_right_checksum(raw: bytes) -> bool:
    """Return whether a line's checksum is right, or it is a line without one, as earlier versions wrote them.

    A field whose name or punctuation is damaged is recognized by the bytes that are left.
    """
    name = raw[-CHECKSUM_BYTES : -CHECKSUM_BYTES + len(CHECKSUM_FIELD)]
    if name == CHECKSUM_FIELD:
        return raw[-CHECKSUM_BYTES + len(CHECKSUM_FIELD) :] == b'%08x"}\n' % crc32(raw[:-CHECKSUM_BYTES])
    similar = sum(map(int.__eq__, name, CHECKSUM_FIELD))
    return not (raw.endswith(_END) and similar >= _MIN_SIMILAR)


def _histogram(limits: list[float], counts: list[float], **numbers: float) -> Histogram:
    numbers = {name: float(number) for name, number in numbers.items()}
    return Histogram([float(limit) for limit in limits], [float(count) for count in counts], **numbers)
