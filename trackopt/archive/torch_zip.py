"""The files that ``torch.save`` has written since 1.6: a zip with a pickle and one record per storage."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from trackopt.archive import rebuild
from trackopt.archive.bounds import Broken
from trackopt.archive.opcodes import OPERATIONS
from trackopt.archive.pickle import Machine
from trackopt.archive.source import Contents
from trackopt.archive.zip import Record, Zip
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.nodes import Storage

MAX_PICKLE = 64 << 20


def load(path: Path, file: int) -> Contents:
    """Read the structure of a zip checkpoint; the tensors stay in the file.

    Args:
        path: For messages.
        file: An open descriptor.

    Raises:
        ArchiveError: It is no checkpoint, or damaged.
    """
    zipped = Zip(path, file)
    source = ZipSource(zipped)
    record = source.find("data.pkl")
    if record is None:
        raise ArchiveError(f"{path}: a zip file without a data.pkl is not a checkpoint; name one that torch.save wrote")
    if record.size > MAX_PICKLE:
        raise ArchiveError(f"{path}: its pickle has {record.size:,} bytes, at most {MAX_PICKLE:,} are read; "
                           "save large arrays as tensors")  # fmt: skip
    machine = Machine(zipped.read(record), rebuild.call, rebuild.storage)
    try:
        tree = machine.run(OPERATIONS)
    except Broken as error:
        raise ArchiveError(f"{path}: its pickle cannot be read: {error}; use another checkpoint") from error
    problems = [*zipped.problems, *source.oddities()]
    if machine.position != record.size:
        problems.append(f"{record.size - machine.position:,} bytes follow the pickle in data.pkl; torch ignores them")
    return Contents("torch zip", tree, source, tuple(machine.globals), problems)


class ZipSource:
    """The storages of a zip checkpoint."""

    def __init__(self, zipped: Zip) -> None:
        self._zip = zipped
        self.path = zipped.path
        first = next(iter(zipped.records), "")
        self._root = first.partition("/")[0] + "/" if "/" in first else ""
        self._lower = {name.lower(): record for name, record in reversed(zipped.records.items())}
        self.byteorder = self._byteorder()
        self.packed = sum(record.packed for record in zipped.records.values())

    def find(self, name: str) -> Record | None:
        """A record by its name below the root, which torch looks up without regard to case."""
        full = self._root + name
        return self._zip.records.get(full) or self._lower.get(full.lower())

    def size(self, storage: Storage) -> int:
        """Bytes of a storage's record."""
        return self._record(storage).size

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """Bytes of a storage."""
        return self._zip.read(self._record(storage), start, stop)

    def damaged(self) -> Iterator[str]:
        """Compare every record's CRC-32 with the directory's; a 0 there with data behind it is none."""
        for record in self._zip.records.values():
            crc = 0
            try:
                for chunk in self._zip.chunks(record):
                    crc = zlib.crc32(chunk, crc)
            except ArchiveError as error:
                yield str(error).removeprefix(f"{self._zip.path}: ")
                continue
            if record.crc != crc and record.crc:
                yield f"record {record.name!r} has the checksum {crc:08x}, {record.crc:08x} was written"

    def oddities(self) -> Iterator[str]:
        """What torch would stumble over, or another program would read differently."""
        strangers = [name for name in self._zip.records if not name.startswith(self._root)]
        if strangers:
            yield f"{len(strangers)} records lie outside of {self._root!r}: {strangers[0]!r}"
        if self.find("version") is None:
            yield "the record 'version' is missing: torch does not load the file"

    def _record(self, storage: Storage) -> Record:
        record = self.find(f"data/{storage.key}")
        if record is None:
            raise self._zip.broken(f"the record of storage {storage.key!r} is missing")
        return record

    def _byteorder(self) -> str:
        record = self.find("byteorder")
        if record is None:
            return "little"
        if record.size > 16 or (text := self._zip.read(record).decode("latin1")) not in ("little", "big"):
            raise self._zip.broken("the byte order is neither 'little' nor 'big'")
        return text
