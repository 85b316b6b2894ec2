"""The files that ``torch.save`` has written since 1.6: a zip with a pickle and one record per storage."""

from __future__ import annotations

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
_NEWEST = 10  # the newest version of the format that torch reads


def load(path: Path, file: int, start: int = 0, size: int | None = None) -> Contents:
    """Read the structure of a zip checkpoint; the tensors stay in the file.

    Args:
        path: For messages.
        file: An open descriptor.
        start: Where the checkpoint begins in the file.
        size: How many bytes it has; by default all up to the end.

    Raises:
        ArchiveError: It is no checkpoint, or damaged.
    """
    zipped = Zip(path, file, start, size)
    source = ZipSource(zipped)
    record = source.find("data.pkl")
    if record is None and source.text("archive_format") == "pt2":
        from trackopt.archive import pt2

        return pt2.contents(zipped, source, zipped.problems)
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
    scripted = source.find("constants.pkl") is not None and any("/code/" in name for name in zipped.records)
    return Contents("TorchScript" if scripted else "torch zip", tree, source, tuple(machine.globals), problems)


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

    def text(self, name: str) -> str | None:
        """What a small record says; None if it is not there, or is not small."""
        record = self.find(name)
        return self._zip.read(record).decode("latin1").strip() if record is not None and record.size <= 16 else None

    def size(self, storage: Storage) -> int:
        """Bytes of a storage's record."""
        return self._record(storage).size

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """Bytes of a storage."""
        return self._zip.read(self._record(storage), start, stop)

    def damaged(self) -> Iterator[str]:
        """Compare every record's CRC-32 with the directory's."""
        from trackopt.archive.checksums import damaged

        return damaged(self._zip)

    def oddities(self) -> Iterator[str]:
        """What torch would stumble over, or another program would read differently."""
        strangers = [name for name in self._zip.records if not name.startswith(self._root)]
        if strangers:
            yield f"{len(strangers)} records lie outside of {self._root!r}: {strangers[0]!r}"
        if not self._root:
            yield "its records stand in no folder: torch does not load the file"
        pickle = self.find("data.pkl")
        if pickle is not None and pickle.name != self._root + "data.pkl":
            yield f"its pickle is named {pickle.name!r}: torch reads it, other programs find none"
        yield from self._odd_version()

    def _odd_version(self) -> Iterator[str]:
        record = self.find("version")
        if record is None:
            yield "the record 'version' is missing: torch does not load the file"
            return
        try:
            text = self._zip.read(record, 0, min(record.size, 16)).strip()
        except ArchiveError as error:
            yield str(error).removeprefix(f"{self.path}: ")
            return
        if not text.isdigit() or not 1 <= int(text) <= _NEWEST:
            yield f"the record 'version' holds {text!r}, not 1 to {_NEWEST}: torch does not load the file"

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
