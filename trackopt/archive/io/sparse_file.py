"""A file elsewhere as the descriptor of an empty copy, which is filled where it is read."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from typing_extensions import Self

    Fetch = Callable[[int, int], bytes]
    TranslateErrors = Callable[[], AbstractContextManager[None]]

_BLOCK_BYTES = 16 << 10
_MAX_REQUEST_BYTES = 8 << 20  # in one request


class SparseFile(int):
    """A descriptor of a temporary file without a name, as long as the original; blocks of it are fetched once.

    Who reads on where the last fetch ended is given more and more at once.

    Args:
        size: Bytes of the original.
        fetch: Its bytes from a start to a stop.
        told: Entered around each fetch and what is written of it; turns what they raise into what the reader is told.
    """

    def __new__(cls, size: int, fetch: Fetch, told: TranslateErrors) -> Self:  # noqa: ARG004, D102 - as below
        return super().__new__(cls, temporary())

    def __init__(self, size: int, fetch: Fetch, told: TranslateErrors) -> None:
        os.truncate(self, size)
        self._size, self._fetch, self._translate_errors = size, fetch, told
        self._present = bytearray(-(-size // _BLOCK_BYTES))
        self._next, self._ahead = 0, 1
        self._lock = threading.Lock()

    def ensure(self, start: int, stop: int) -> None:
        """Have the bytes ``start`` to ``stop``, as far as there are some."""
        with self._lock:
            block, last = start // _BLOCK_BYTES, min(-(-stop // _BLOCK_BYTES), len(self._present))
            while (block := self._present.find(0, block, last)) >= 0:
                block = self._fetch_blocks(block, last)

    def _fetch_blocks(self, block: int, last: int) -> int:
        """Fetch from a block on to the last one that is wanted, or to one that is there; where that ended."""
        self._ahead = min(2 * self._ahead, _MAX_REQUEST_BYTES // _BLOCK_BYTES) if block == self._next else 1
        end = min(max(last, block + self._ahead), block + _MAX_REQUEST_BYTES // _BLOCK_BYTES, len(self._present))
        if (known := self._present.find(1, block, end)) >= 0:
            end = known
        start = block * _BLOCK_BYTES
        with self._translate_errors():
            data = self._fetch(start, min(end * _BLOCK_BYTES, self._size))
            while data:  # a disk that is nearly full takes less
                written = os.pwrite(self, data, start)
                data, start = data[written:], start + written
        self._present[block:end] = b"\1" * (end - block)
        self._next = end
        return end


def pread(file: int, length: int, offset: int) -> bytes:
    """As ``os.pread``, also of a `SparseFile`."""
    if isinstance(file, SparseFile):
        file.ensure(offset, offset + length)
    return os.pread(file, length, offset)


def temporary() -> int:
    """A file that is gone when it is closed."""
    import tempfile

    file, name = tempfile.mkstemp(prefix="trackopt-")
    os.unlink(name)  # noqa: PTH108 - there is no path any more
    return file
