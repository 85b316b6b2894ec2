"""The records of a zip checkpoint: its pickle and its storages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.archive.formats import legacy
from trackopt.archive.unpickler.limits import Limits, MalformedPickle, PickleLimitExceeded, make_error
from trackopt.archive.unpickler.unpickle import Unpickled, unpickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from trackopt.archive.io.zip_reader import Record, Zip
    from trackopt.archive.tree import Storage

MAX_PICKLE_BYTES = 64 << 20  # of one that is compressed
MAX_NESTED_PICKLE_BYTES = 8 << 20  # of all the pickles in one container: many names can refer to one, and each is run
_MAX_FORMAT_VERSION = 10  # that torch reads


class ZipSource:
    """The storages of a zip checkpoint.

    Args:
        zipped: The file.
        folder: The folder in it that has the storages.

    Attributes:
        zipped: The file.
        pickle: The record of the pickle that names the storages.
        pickle_size: Bytes of it.
    """

    def __init__(self, zipped: Zip, folder: str = "data") -> None:
        self.zipped = zipped
        self._folder = folder
        self.path = zipped.path
        first = next(iter(zipped.records), "")
        self._root = first.partition("/")[0] + "/" if "/" in first else ""
        self._lower = {name.lower(): record for name, record in reversed(zipped.records.items())}
        self.byteorder = self._byteorder()
        self.checksummed_bytes = sum(record.packed_size for record in zipped.records.values())
        self.pickle = self.find("data.pkl")
        self.pickle_size = 0 if self.pickle is None else self.pickle.size

    def find(self, name: str) -> Record | None:
        """Return a record by its name below the root; like torch, ignore case."""
        full_name = self._root + name
        return self.zipped.records.get(full_name) or self._lower.get(full_name.lower())

    def read_text(self, name: str) -> str | None:
        """Return the text of a small record; None if it is missing or not small."""
        record = self.find(name)
        return self.zipped.read(record).decode("latin1").strip() if record is not None and record.size <= 16 else None

    def read_pickle(self) -> bytes:
        """Return the pickle that names the storages; nothing if it is missing."""
        return b"" if self.pickle is None else self.zipped.read(self.pickle)

    def size(self, storage: Storage) -> int:
        """Return the size of a storage's record."""
        return self.record(storage).size

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop`` of a storage."""
        return self.zipped.read(self.record(storage), start, stop)

    def storage_records(self) -> dict[str, Record]:
        """Return the records of storages by their keys."""
        prefix = f"{self._root}{self._folder}/"
        return {name[len(prefix) :]: record for name, record in self.zipped.records.items() if name.startswith(prefix)}

    def verify_checksums(self, storages: Collection[Storage] | None = None) -> Iterator[str]:
        """Compare the CRC-32 of all records, or of the given storages and all other records, with the directory."""
        from trackopt.archive.io.checksums import find_damaged

        records = list(self.zipped.records.values())
        if storages is not None:
            names = {self.record(storage).name for storage in storages}
            records = [record for record in records if record.name in names or f"/{self._folder}/" not in record.name]
        return find_damaged(self.zipped, records)

    def find_oddities(self) -> Iterator[str]:
        """Yield what torch would refuse, or another program would read differently."""
        outside = [name for name in self.zipped.records if not name.startswith(self._root)]
        if outside:
            yield f"{len(outside)} records lie outside of {self._root!r}: {outside[0]!r}"
        if not self._root:
            yield "its records are in no folder: torch does not load the file"
        if self.pickle is not None and self.pickle.name != self._root + "data.pkl":
            yield f"its pickle is named {self.pickle.name!r}: torch reads it, other programs find none"
        yield from self._version_problems()

    def _version_problems(self) -> Iterator[str]:
        record = self.find("version")
        if record is None:
            yield "the record 'version' is missing: torch does not load the file"
            return
        try:
            text = self.zipped.read(record, 0, min(record.size, 16)).strip()
        except ArchiveError as error:
            yield str(error).removeprefix(f"{self.path}: ")
            return
        if not text.isdigit() or not 1 <= int(text) <= _MAX_FORMAT_VERSION:
            yield f"the record 'version' holds {text!r}, not 1 to {_MAX_FORMAT_VERSION}: torch does not load the file"

    def record(self, storage: Storage) -> Record:
        """Return the record of a storage.

        Raises:
            ArchiveError: It is missing.
        """
        record = self.find(f"{self._folder}/{storage.key}")
        if record is None:
            raise self.zipped.make_error(f"the record of storage {storage.key!r} is missing")
        return record

    def _byteorder(self) -> str:
        record = self.find("byteorder")
        if record is None:
            return "little"
        if record.size > 16 or (text := self.zipped.read(record).decode("latin1")) not in ("little", "big"):
            raise self.zipped.make_error("the byte order is neither 'little' nor 'big'")
        return text


def unpickle_record(zipped: Zip, record: Record | None) -> Unpickled:
    """Run the pickle in a record.

    Raises:
        ArchiveError: The record is missing, or its pickle is malformed.
    """
    path = zipped.path
    if record is None:
        raise ArchiveError(f"{path}: a zip file without a data.pkl is not a checkpoint; name one that torch.save wrote")
    largest = max(MAX_PICKLE_BYTES, record.packed_size)
    try:
        if record.size > largest:
            raise PickleLimitExceeded(f"{record.size:,} bytes, of which at most {largest:,} are read")
        # A long one is read in pieces: a file with holes has any size.
        data = zipped.byte_range(record) if record.size > MAX_PICKLE_BYTES else None
        limits = Limits.for_size(record.packed_size, zipped.size)
        return unpickle(data or zipped.read(record), legacy.load_nested, limits=limits)
    except MalformedPickle as error:
        raise make_error(path, error) from error
