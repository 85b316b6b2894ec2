"""TensorBoard's event file, written byte by byte: many values in one event, and a checksum that the processor computes.

The package's own writer takes 76 µs for the checksum of an event of 20 scalars, and importing it costs memory. The
format is that of TensorFlow's ``event.proto``, ``summary.proto`` and ``record_writer.h``: each record is its length
(u64), the length's masked CRC-32C, the data, and the data's.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import TYPE_CHECKING

import google_crc32c

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.journal import Histogram

_VERSION = b"\x1a\x0dbrain.Event:2"
_START = b"\x3a\x02\x08\x01"  # SessionLog.START
_NO_TENSOR = b"\x08\x01\x12\x02\x12\x00"  # float32, of shape (0,)
_TEXT = b"\x08\x07\x12\x00"  # a single string
_IS_TENSOR = b"\x20\x02"  # DATA_CLASS_TENSOR


def version(when: float) -> bytes:
    """The record that a file begins with."""
    return _record(_event(when, 0, _VERSION))


def start(when: float, step: int) -> bytes:
    """A record at whose sight readers drop what earlier files hold from ``step`` on."""
    return _record(_event(when, step, _START))


def summary(when: float, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]) -> bytes:
    """The record with all values of one step."""
    values = [_scalar(tag) + _float32(value) for tag, value in scalars.items()]
    values += [field(0x0A, field(0x0A, tag.encode()) + field(0x2A, _histogram(h))) for tag, h in histograms.items()]
    return _record(_event(when, step, field(0x2A, b"".join(values))))


def plugin_summary(when: float, plugin: str, tag: str, *, content: bytes = b"", text: bytes | None = None) -> bytes:
    """The record that a plugin is configured by, at step 0.

    Readers keep the first ``content`` of a tag for good, and the latest ``text``.
    """
    tensor = _NO_TENSOR if text is None else _TEXT + field(0x42, text)
    data = field(0x0A, plugin.encode()) + (field(0x12, content) if content else b"")
    metadata = field(0x0A, data) + _IS_TENSOR
    value = field(0x0A, tag.encode()) + field(0x42, tensor) + field(0x4A, metadata)
    return _record(_event(when, 0, field(0x2A, field(0x0A, value))))


def field(key: int, content: bytes) -> bytes:
    """A field of a message: its key (number and wire type 2), its length, and what is in it."""
    return bytes([key]) + _varint(len(content)) + content


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<L", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _event(when: float, step: int, content: bytes) -> bytes:
    number = b"\x10" + _varint(step) if step else b""  # zero goes without saying
    return b"\x09" + struct.pack("<d", when) + number + content


@cache
def _scalar(tag: str) -> bytes:
    """A value up to its number."""
    value = field(0x0A, tag.encode()) + b"\x15"
    return b"\x0a" + _varint(len(value) + 4) + value


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def _histogram(histogram: Histogram) -> bytes:
    numbers = (histogram.min, histogram.max, histogram.num, histogram.sum, histogram.sum_squares)
    content = b"".join(struct.pack("<Bd", number << 3 | 1, value) for number, value in enumerate(numbers, 1))
    return content + field(0x32, _doubles(histogram.limits)) + field(0x3A, _doubles(histogram.counts))


def _doubles(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
