"""Ranges of bytes that are read in slices: of an open file, or of memory.

Formats whose tensors lie at known offsets give each `Storage` such a range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.archive.io.file import File


class ByteRange(Protocol):
    """Bytes to read from."""

    @property
    def size(self) -> int:
        """The number of bytes."""

    @property
    def key(self) -> str:
        """A name that no other range in the same file has."""

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``; raises ArchiveError if they are missing."""

    def slice(self, start: int, stop: int) -> ByteRange:
        """Return a part of this range; bytes after its end are left out."""


class FileRange:
    """Bytes of an open file, read on demand.

    Args:
        path: The file, for messages.
        file: Where to read.
        start: The first byte.
        size: How many; by default all to the file's end.
    """

    def __init__(self, path: Path, file: File, start: int = 0, size: int | None = None) -> None:
        self.path = path
        self.file = file
        self.start = start
        self.size = file.size - start if size is None else size
        self.key = f"@{start}"

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``."""
        if not 0 <= start <= stop <= self.size:
            raise _out_of_range(self.path, start, stop, self.size)
        offset, length = self.start + start, stop - start
        data = self.file.read(offset, length)
        if len(data) < length:
            raise _out_of_range(self.path, offset, offset + length, offset + len(data))
        return data

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``start`` on; raises ArchiveError if they are not all there."""
        stop = start + len(target)
        if not 0 <= start <= stop <= self.size:
            raise _out_of_range(self.path, start, stop, self.size)
        offset = self.start + start
        count = self.file.read_into(offset, target)
        if count < len(target):
            raise _out_of_range(self.path, offset, offset + len(target), offset + count)

    def slice(self, start: int, stop: int) -> FileRange:
        """Return a part of this range."""
        stop = min(stop, self.size)
        return FileRange(self.path, self.file, self.start + start, max(0, stop - start))


class BytesRange:
    """Bytes in memory, such as those of a pickle."""

    def __init__(self, data: bytes, start: int = 0) -> None:
        self._data = data
        self.size = len(data)
        self.key = f"#{id(data)}+{start}"

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``."""
        if not 0 <= start <= stop <= self.size:
            raise _out_of_range("memory", start, stop, self.size)
        return self._data[start:stop]

    def slice(self, start: int, stop: int) -> BytesRange:
        """Return a copy of a part of this range."""
        return BytesRange(self._data[start:stop], start)


def _out_of_range(path: Path | str, start: int, stop: int, size: int) -> ArchiveError:
    what = f"bytes {start:,} to {stop:,} are missing, it ends at {size:,}"
    return ArchiveError(f"{path}: {what}; the file is damaged, copy it again or use another checkpoint")
