"""The bytes of a pickle, all at hand or read from a file a window at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import BYTES, Storage, Tensor
from trackopt.archive.unpickler.limits import MalformedPickle

if TYPE_CHECKING:
    import struct

    from trackopt.archive.io.byte_ranges import ByteRange

MAX_COPIED = 64 << 20
_WINDOW = 1 << 20
_SHORT = 1 << 14  # behind a long payload, which may be followed by another one
_AHEAD = 1 << 10  # no operation but for its text or bytes is longer
_LARGE = 1 << 16


class BufferedReader:
    """What a pickle machine reads from.

    Args:
        data: The bytes, or where to read them as they are needed.
        position: Where the first one is.

    Attributes:
        data: The bytes, or the window of them that is at hand.
        position: Where the next byte is read in ``data``.
        low_watermark: Behind which position the window is moved before an operation is read.
    """

    def __init__(self, data: bytes | ByteRange, position: int = 0) -> None:
        self.data = data if isinstance(data, bytes) else b""
        self.position = position
        self._region = None if isinstance(data, bytes) else data
        self._base = 0
        self.low_watermark = len(self.data) if self._region is None else -1
        self._taken = 0

    def take(self, length: int) -> bytes:
        """The next bytes."""
        end = self.position + length
        if length < 0 or end > len(self.data):
            return self._read_beyond_buffer(length)
        data = self.data[self.position : end]
        self.position = end
        return data

    def payload(self, length: int) -> Any:
        """The next bytes; where there are many in a file, a node that reads them when they are asked for."""
        start = self.offset
        if self._region is None or length < _LARGE or start + length > self._region.size:
            return self.take(length)
        self.refill(start + length, _SHORT)
        part = self._region.slice(start, start + length)
        return Tensor(Storage(part.key, "uint8", "cpu", length, part), "uint8", (length,), (1,), kind=BYTES)

    def number(self, kind: struct.Struct) -> Any:
        """The next number of a fixed size."""
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def line(self) -> str:
        """The next text up to a newline."""
        end = self.data.find(b"\n", self.position)
        while end < 0:
            end = self._find_newline()
        data = self.data[self.position : end]
        self.position = end + 1
        return data.decode("utf-8", "surrogateescape")

    @property
    def offset(self) -> int:
        """Where the next byte stands in the file or the bytes; behind the pickle once it has run."""
        return self._base + self.position

    def refill(self, offset: int | None = None, length: int = _WINDOW) -> None:
        """Move the window, so that it begins at the next byte or at a given one."""
        if self._region is None:
            return
        self._base = self.offset if offset is None else offset
        if self._base > self._region.size:
            raise MalformedPickle(f"it ends at byte {self._region.size}")
        self.position = 0
        self.data = self._region.read(self._base, min(self._base + length, self._region.size))
        whole = self._base + len(self.data) == self._region.size
        self.low_watermark = len(self.data) if whole else len(self.data) - _AHEAD

    def _read_beyond_buffer(self, length: int) -> bytes:
        """The next bytes, of which some are not in the window."""
        start = self.offset
        if self._region is None or length < 0 or start + length > self._region.size:
            raise MalformedPickle(f"{length} bytes are announced at byte {start}, there are fewer")
        self._taken += length
        if self._taken > MAX_COPIED:
            raise MalformedPickle(f"more than {MAX_COPIED:,} bytes of text")
        data = self._region.read(start, start + length)
        self.refill(start + length)
        return data

    def _find_newline(self) -> int:
        """Widen the window until a line ends in it."""
        length = 2 * max(len(self.data) - self.position, _WINDOW)
        if self._region is None or self.offset + len(self.data) - self.position >= self._region.size:
            raise MalformedPickle(f"a line does not end at byte {self.offset}")
        if length > MAX_COPIED:
            raise MalformedPickle(f"more than {MAX_COPIED:,} bytes of text")
        self.refill(length=length)
        return self.data.find(b"\n", self.position)
