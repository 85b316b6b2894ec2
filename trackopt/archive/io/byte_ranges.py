"""A stretch of bytes that can be read in slices: of an open file, or of memory.

Formats whose tensors lie at known places hand such stretches over as what a `Storage` holds.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from trackopt.archive.io.sparse_file import pread
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.tree import Storage


class ByteRange(Protocol):
    """Bytes to read from."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def key(self) -> str:
        """A name that no other stretch in the same file has."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``; raises ArchiveError if they are not there."""

    def slice(self, start: int, stop: int) -> ByteRange:
        """A stretch of this one; what lies behind its end is left out."""


class FileRegion:
    """Bytes of an open file, read when they are asked for.

    Args:
        path: The file, for messages.
        file: An open descriptor; it is read at given offsets only.
        start: The first byte.
        size: How many; by default all to the file's end.
    """

    def __init__(self, path: Path, file: int, start: int = 0, size: int | None = None) -> None:
        self.path = path
        self.file = file
        self.start = start
        self.size = os.fstat(file).st_size - start if size is None else size
        self.key = f"@{start}"

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``."""
        if not 0 <= start <= stop <= self.size:
            raise _outside(self.path, start, stop, self.size)
        offset, length = self.start + start, stop - start
        data = pread(self.file, length, offset)
        while len(data) < length:
            more = pread(self.file, length - len(data), offset + len(data))
            if not more:
                raise _outside(self.path, offset, offset + length, offset + len(data))
            data += more
        return data

    def slice(self, start: int, stop: int) -> FileRegion:
        """A stretch of this one."""
        stop = min(stop, self.size)
        return FileRegion(self.path, self.file, self.start + start, max(0, stop - start))


class BytesRegion:
    """Bytes that are in memory already, such as those that stand in a pickle."""

    def __init__(self, data: bytes, start: int = 0) -> None:
        self._data = data
        self.size = len(data)
        self.key = f"#{id(data)}+{start}"

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``."""
        if not 0 <= start <= stop <= self.size:
            raise _outside("memory", start, stop, self.size)
        return self._data[start:stop]

    def slice(self, start: int, stop: int) -> BytesRegion:
        """A copy of a stretch of this one."""
        return BytesRegion(self._data[start:stop], start)


class RangeSource:
    """The source of a format whose storages hold their own bytes; it has no checksums.

    Args:
        path: The file, for messages.
        byteorder: ``"little"`` or ``"big"``.
    """

    checksummed_bytes = 0

    def __init__(self, path: Path, byteorder: str = "little") -> None:
        self.path = path
        self.byteorder = byteorder

    def size(self, storage: Storage) -> int:
        """Bytes of a storage."""
        raise self._missing(storage)

    def read(self, storage: Storage, start: int, stop: int) -> bytes:  # noqa: ARG002 - a `TensorSource` has these
        """Bytes of a storage."""
        raise self._missing(storage)

    def verify_checksums(self) -> Iterator[str]:
        """Nothing: there are no checksums to compare with."""
        return iter(())

    def _missing(self, storage: Storage) -> ArchiveError:
        return ArchiveError(f"{self.path}: the data of storage {storage.key!r} is missing; use another checkpoint")


def _outside(path: Path | str, start: int, stop: int, size: int) -> ArchiveError:
    what = f"bytes {start:,} to {stop:,} are not there, it ends at {size:,}"
    return ArchiveError(f"{path}: {what}; the file is damaged, copy it again or use another checkpoint")
