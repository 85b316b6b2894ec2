"""A file of ``torch.save`` that was unpacked into a directory: its pickle, and a file for each storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.archive.formats import legacy
from trackopt.archive.io.file import File
from trackopt.archive.io.open_files import ADVICE, OpenFiles, resolve_inside
from trackopt.archive.io.source import Contents, RangeSource
from trackopt.archive.unpickler.limits import MalformedPickle, make_error
from trackopt.archive.unpickler.unpickle import unpickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.archive.tree import Storage

PICKLE = "data.pkl"
_BYTEORDERS = ("little", "big")


def is_unpacked(directory: Path) -> bool:
    """Return whether a directory has the records of a file that ``torch.save`` wrote."""
    return (directory / PICKLE).is_file() and ((directory / "data").is_dir() or (directory / "version").is_file())


def load(files: OpenFiles) -> Contents:
    """Read the structure of an unpacked checkpoint; the tensors stay in its files.

    Raises:
        ArchiveError: It is malformed.
    """
    data = files.read_all(PICKLE)
    try:
        pickled = unpickle(data, legacy.load_nested)
    except MalformedPickle as error:
        raise make_error(files.directory / PICKLE, error) from error
    text = files.read_all("byteorder").decode("latin1") if (files.directory / "byteorder").is_file() else "little"
    if text not in _BYTEORDERS:
        raise ArchiveError(f"{files.directory}: the byte order is neither 'little' nor 'big'; {ADVICE}")
    source = _UnpackedSource(files.directory, text)
    rest = len(data) - pickled.end
    problems = [f"{rest:,} bytes follow the pickle in data.pkl; torch ignores them"] if rest else []
    return Contents("unpacked torch zip", pickled.tree, source, pickled.globals, problems, files)


class _UnpackedSource(RangeSource):
    """The storages in a directory; there may be more of them than a process can open at a time."""

    def size(self, storage: Storage) -> int:
        """Return the size of a storage's file."""
        file = self._open(storage)
        size = file.size
        file.close()
        return size

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop`` of a storage."""
        file = self._open(storage)
        data = file.read(start, stop - start)
        file.close()
        if len(data) < stop - start:
            raise ArchiveError(f"{self.path}: the file of storage {storage.key!r} is too short; {ADVICE}")
        return data

    def _open(self, storage: Storage) -> File:
        path = resolve_inside(self.path / "data", storage.key)
        try:
            file = File.open(path)
        except OSError as error:
            raise self._missing(storage) from error
        if not file.is_regular:
            file.close()
            raise self._missing(storage)
        return file
