"""Blocks of open files, read into one buffer per thread, which stays in a core's cache.

A new buffer for each read would cost more than the read: its pages are fresh ones, which the kernel clears first. The
file is not mapped: a training that writes it anew would end the reader with SIGBUS.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from trackopt.archive.io.byte_ranges import FileRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BLOCK_BYTES = 1 << 19  # with what is computed of it, it fits the second-level cache
_ALIGNMENT = 64
_MAX_GAP_BYTES = 4096  # between ranges that share a block

Item = TypeVar("Item")
_compare_memory = ctypes.CDLL(None if os.name == "posix" else "msvcrt").memcmp
_compare_memory.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


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


def are_equal(x: bytes | memoryview, y: bytes | memoryview) -> bool:
    """Return True if two blocks hold the same bytes; without the GIL, if both come from a `BlockReader`."""
    if len(x) != len(y):
        return False
    if isinstance(x, bytes) or isinstance(y, bytes) or x.readonly or y.readonly:
        return bytes(x) == bytes(y)  # views would be compared byte by byte
    if not len(x):
        return True
    addresses = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (x, y))
    return not _compare_memory(*addresses, len(x))


@dataclass(frozen=True)
class Block(Generic[Item]):
    """A block of a file, and the parts of ranges that are in it.

    Attributes:
        where: The block.
        parts: The item of each range, with the start and the stop of its part in the block.
    """

    where: FileRange
    parts: list[tuple[Item, int, int]]

    def split(self) -> Iterator[Block[Item]]:
        """Yield a block for each part."""
        for item, start, stop in self.parts:
            yield Block(self.where.slice(start, stop), [(item, 0, stop - start)])


def divide(ranges: Iterable[tuple[FileRange, Item]], unit: int = 16) -> Iterator[Block[Item]]:
    """Divide ranges into blocks in the order of the file; small neighbours share one.

    Args:
        ranges: Ranges of files, each with an item.
        unit: Bytes; each range is cut at multiples of it.
    """
    step = BLOCK_BYTES // unit * unit
    parts: list[tuple[FileRange, Item]] = []
    for where, item in sorted(ranges, key=lambda pair: (id(pair[0].file), pair[0].start)):
        if parts and not _fits(parts, where):
            yield _join(parts)
            parts = []
        if where.size <= step:
            parts.append((where, item))
            continue
        if parts:
            yield _join(parts)
            parts = []
        for start in range(0, where.size, step):
            yield _join([(where.slice(start, start + step), item)])
    if parts:
        yield _join(parts)


def _fits(parts: list[tuple[FileRange, Item]], where: FileRange) -> bool:
    first, last = parts[0][0], parts[-1][0]
    is_near = where.file is last.file and where.start - (last.start + last.size) <= _MAX_GAP_BYTES
    return is_near and where.start + where.size - first.start <= BLOCK_BYTES


def _join(parts: list[tuple[FileRange, Item]]) -> Block[Item]:
    first = parts[0][0]
    stop = max(where.start + where.size for where, _ in parts)
    whole = FileRange(first.path, first.file, first.start, stop - first.start)
    at = [(item, where.start - first.start) for where, item in parts]
    return Block(
        whole, [(item, start, start + where.size) for (item, start), (where, _) in zip(at, parts, strict=True)]
    )
