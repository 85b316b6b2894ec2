"""Blocks of open files, read into one buffer per thread, which stays in a core's cache.

A new buffer for each read would cost more than the read: its pages are fresh ones, which the kernel clears first. The
file is not mapped: a training that writes it anew would end the reader with SIGBUS.
"""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trackopt.archive.io.byte_ranges import FileRange

BLOCK_BYTES = 1 << 18  # with what is computed of it, it fits the second-level cache
_ALIGNMENT = 64


class BlockReader(threading.local):
    """Reads blocks of at most `BLOCK_BYTES`; each thread has a buffer of its own."""

    def __init__(self) -> None:
        self._buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES + _ALIGNMENT))

    def read(self, where: FileRange, start: int, stop: int) -> memoryview:
        """Read the bytes ``start`` to ``stop`` of a range; they are valid until this thread reads again.

        They are aligned in memory as in the file.

        Raises:
            ArchiveError: They are not all in the file.
        """
        at = (where.start + start) % _ALIGNMENT
        target = self._buffer[at : at + stop - start]
        where.read_into(start, target)
        return target
