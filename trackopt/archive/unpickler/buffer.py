"""Buffered reading of a pickle, from memory or from a file a window at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import BYTES, Storage, Tensor
from trackopt.archive.unpickler.limits import MalformedPickle, PickleLimitExceeded

if TYPE_CHECKING:
    import struct

    from trackopt.archive.io.byte_ranges import ByteRange

_WINDOW_BYTES = 1 << 20
_SHORT_WINDOW_BYTES = 1 << 14  # after a long payload, which another one may follow
_MAX_OPERATION_BYTES = 1 << 10  # without its text or payload
_MIN_PAYLOAD_BYTES = 1 << 16  # of a payload that stays in the file


class BufferedReader:
    """The input of a pickle machine.

    Args:
        data: The bytes, or the range to read them from.
        max_text_bytes: The most bytes of long texts.

    Attributes:
        data: The bytes, or the current window of them.
        position: The index of the next byte in ``data``.
        low_watermark: The position after which the window is moved before an operation is read.
    """

    def __init__(self, data: bytes | ByteRange, max_text_bytes: int) -> None:
        self.data = data if isinstance(data, bytes) else b""
        self.position = 0
        self._byte_range = None if isinstance(data, bytes) else data
        self._base = 0
        self.low_watermark = len(self.data) if self._byte_range is None else -1
        self._copied_beyond = 0
        self._max_text_bytes = max_text_bytes

    def take(self, length: int) -> bytes:
        """Read the next bytes."""
        end = self.position + length
        if length < 0 or end > len(self.data):
            return self._read_beyond_buffer(length)
        data = self.data[self.position : end]
        self.position = end
        return data

    def payload(self, length: int) -> Any:
        """Read the next bytes; for many bytes in a file, return a node that reads them on demand."""
        start = self.offset
        if self._byte_range is None or length < _MIN_PAYLOAD_BYTES or start + length > self._byte_range.size:
            return self.take(length)
        self.refill(start + length, _SHORT_WINDOW_BYTES)
        part = self._byte_range.slice(start, start + length)
        return Tensor(Storage(part.key, "uint8", "cpu", length, part), "uint8", (length,), (1,), kind=BYTES)

    def number(self, kind: struct.Struct) -> Any:
        """Read the next number of a fixed size."""
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def line(self) -> str:
        """Read the text up to the next newline."""
        end = self.data.find(b"\n", self.position)
        while end < 0:
            end = self._find_newline()
        data = self.data[self.position : end]
        self.position = end + 1
        return data.decode("utf-8", "surrogateescape")

    @property
    def offset(self) -> int:
        """The offset of the next byte in the input; after a run, that of the pickle's end."""
        return self._base + self.position

    def refill(self, offset: int | None = None, length: int = _WINDOW_BYTES) -> None:
        """Move the window to the next byte or to a given offset."""
        if self._byte_range is None:
            return
        self._base = self.offset if offset is None else offset
        if self._base > self._byte_range.size:
            raise MalformedPickle(f"it ends at byte {self._byte_range.size}")
        self.position = 0
        self.data = self._byte_range.read(self._base, min(self._base + length, self._byte_range.size))
        is_last = self._base + len(self.data) == self._byte_range.size
        self.low_watermark = len(self.data) if is_last else len(self.data) - _MAX_OPERATION_BYTES

    def _read_beyond_buffer(self, length: int) -> bytes:
        """Read the next bytes, some of which are not in the window."""
        start = self.offset
        if self._byte_range is None or length < 0 or start + length > self._byte_range.size:
            raise MalformedPickle(f"{length} bytes are announced at byte {start}, fewer are left")
        self._copied_beyond += length
        if self._copied_beyond > self._max_text_bytes:
            raise PickleLimitExceeded(f"more than {self._max_text_bytes:,} bytes of text")
        data = self._byte_range.read(start, start + length)
        self.refill(start + length)
        return data

    def _find_newline(self) -> int:
        """Double the window until a line ends in it."""
        length = 2 * max(len(self.data) - self.position, _WINDOW_BYTES)
        if self._byte_range is None or self.offset + len(self.data) - self.position >= self._byte_range.size:
            raise MalformedPickle(f"a line does not end at byte {self.offset}")
        if length > self._max_text_bytes:
            raise PickleLimitExceeded(f"more than {self._max_text_bytes:,} bytes of text")
        self.refill(length=length)
        return self.data.find(b"\n", self.position)
