"""A temporary copy of a remote file, filled block by block where it is read."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from trackopt.archive.io.file import File
from trackopt.archive.io.positioned import write_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    Fetch = Callable[[int, int], bytes]
    TranslateErrors = Callable[[], AbstractContextManager[None]]

_BLOCK_BYTES = 16 << 10
_MAX_REQUEST_BYTES = 8 << 20


class SparseFile(File):
    """A nameless temporary file of the original's size; each block is fetched once.

    A sequential reader makes each request twice as large as the one before it.

    Args:
        size: Bytes of the original.
        fetch: Returns the original's bytes from a start to a stop.
        translate_errors: Entered around each request and its write to disk, to convert what they raise.
    """

    def __init__(self, size: int, fetch: Fetch, translate_errors: TranslateErrors) -> None:
        super().__init__(open_temporary())
        os.ftruncate(self.descriptor, size)
        self._size, self._fetch, self._translate_errors = size, fetch, translate_errors
        self._present = bytearray(-(-size // _BLOCK_BYTES))
        self._next, self._ahead = 0, 1
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes, after fetching the blocks that are missing; fewer only if the file ends."""
        self.ensure(offset, offset + length)
        return super().read(offset, length)

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill ``target``, after fetching the blocks that are missing, and return how many bytes there were."""
        self.ensure(offset, offset + len(target))
        return super().read_into(offset, target)

    def ensure(self, start: int, stop: int) -> None:
        """Fetch the bytes ``start`` to ``stop``, as far as the original has them."""
        with self._lock:
            block, last = start // _BLOCK_BYTES, min(-(-stop // _BLOCK_BYTES), len(self._present))
            while (block := self._present.find(0, block, last)) >= 0:
                block = self._fetch_blocks(block, last)

    def _fetch_blocks(self, block: int, last: int) -> int:
        """Fetch from ``block`` to ``last`` or to the next block that is present; return where that ended."""
        self._ahead = min(2 * self._ahead, _MAX_REQUEST_BYTES // _BLOCK_BYTES) if block == self._next else 1
        end = min(max(last, block + self._ahead), block + _MAX_REQUEST_BYTES // _BLOCK_BYTES, len(self._present))
        if (present := self._present.find(1, block, end)) >= 0:
            end = present
        start = block * _BLOCK_BYTES
        with self._translate_errors():
            data = self._fetch(start, min(end * _BLOCK_BYTES, self._size))
            while data:  # a disk that is nearly full takes less
                written = write_at(self.descriptor, data, start)
                data, start = data[written:], start + written
        self._present[block:end] = b"\1" * (end - block)
        self._next = end
        return end


def open_temporary() -> int:
    """Open a temporary file that disappears when it is closed; return its descriptor."""
    import tempfile

    with tempfile.TemporaryFile(prefix="trackopt-") as file:
        return os.dup(file.fileno())
