"""Where the bytes of a storage are in an open file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.archive.formats.members import StorageRange
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.archive.io.byte_ranges import FileRange

if TYPE_CHECKING:
    from trackopt.archive.io.source import TensorSource
    from trackopt.archive.io.zip_reader import Record
    from trackopt.archive.tree import Storage


def file_range(source: TensorSource, storage: Storage) -> FileRange | None:
    """Return the range of a file that holds a storage as it is; None if that is in memory, compressed or byte-swapped.

    Raises:
        ArchiveError: It is missing.
    """
    if storage.byteorder not in (None, source.byteorder):
        return None
    byte_range = storage.byte_range
    if isinstance(byte_range, StorageRange):
        return file_range(byte_range.source, byte_range.storage)
    if byte_range is None and isinstance(source, ZipSource):
        return source.zipped.byte_range(source.record(storage))
    return byte_range if isinstance(byte_range, FileRange) else None


def zip_record(source: TensorSource, storage: Storage) -> Record | None:
    """Return the record of a zip file that holds a storage; None in other formats.

    Raises:
        ArchiveError: It is missing.
    """
    if isinstance(storage.byte_range, StorageRange):
        return zip_record(storage.byte_range.source, storage.byte_range.storage)
    if storage.byte_range is not None or not isinstance(source, ZipSource):
        return None
    return source.record(storage)
