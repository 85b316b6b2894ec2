"""The files that ``torch.save`` has written since 1.6: a zip with a pickle and one record per storage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.source import Contents
from trackopt.archive.io.zip_reader import Record, Zip
from trackopt.archive.tree import UnknownObject
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from trackopt.archive.tree import Storage

MAX_PICKLE = 64 << 20
MAX_PICKLED = 8 << 20  # of pickles that many names can stand for, each of which is run
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
    if source.pickle is None and source.text("archive_format") == "pt2":
        from trackopt.archive.formats import pt2

        return pt2.contents(zipped, source, zipped.problems)
    machine, tree = unpickle(zipped, source.pickle)
    problems = [*zipped.problems, *source.oddities()]
    if rest := source.pickled - machine.position:
        problems.append(f"{rest:,} bytes follow the pickle in data.pkl; torch ignores them")
    constants = source.find("constants.pkl")
    if constants is None or not any("/code/" in name for name in zipped.records):
        return Contents("torch zip", tree, source, tuple(machine.globals), problems)
    try:
        tree = _with_constants(tree, unpickle(zipped, constants)[1], ZipSource(zipped, "constants"))
    except ArchiveError as error:
        problems.append(f"the constants in its code are not read: {str(error).removeprefix(f'{path}: ')}")
    return Contents("TorchScript", tree, source, tuple(machine.globals), problems)


def unpickle(zipped: Zip, record: Record | None) -> tuple[PickleMachine, Any]:
    """What the pickle in a record describes, and the machine that has run it.

    Raises:
        ArchiveError: There is no such record, or it is malformed.
    """
    path = zipped.path
    if record is None:
        raise ArchiveError(f"{path}: a zip file without a data.pkl is not a checkpoint; name one that torch.save wrote")
    if record.size > MAX_PICKLE:
        raise ArchiveError(f"{path}: its pickle has {record.size:,} bytes, at most {MAX_PICKLE:,} are read; "
                           "save large arrays as tensors")  # fmt: skip
    machine = PickleMachine(zipped.read(record), constructors.construct, constructors.storage)
    try:
        return machine, machine.run(OPERATIONS)
    except MalformedPickle as error:
        raise ArchiveError(f"{path}: its pickle cannot be read: {error}; use another checkpoint") from error


def _with_constants(tree: Any, constants: Any, source: ZipSource) -> Any:
    """The module with its constants under the name that its code has for them: ``CONSTANTS.c0``."""
    from trackopt.archive.formats.members import prefix_storage_keys

    found = prefix_storage_keys(constants, "constants", source) if isinstance(constants, tuple) else ()
    if not found or not isinstance(tree, UnknownObject):
        return tree
    named = {"CONSTANTS": {f"c{index}": value for index, value in enumerate(found)}}
    state = tree.state if isinstance(tree.state, dict) else {}
    return replace(tree, state={**state, **named})


class ZipSource:
    """The storages of a zip checkpoint.

    Args:
        zipped: The file.
        folder: Where in it they are.

    Attributes:
        pickle: The record of the pickle that names them.
        pickled: Bytes of it.
    """

    def __init__(self, zipped: Zip, folder: str = "data") -> None:
        self._zip = zipped
        self._folder = folder
        self.path = zipped.path
        first = next(iter(zipped.records), "")
        self._root = first.partition("/")[0] + "/" if "/" in first else ""
        self._lower = {name.lower(): record for name, record in reversed(zipped.records.items())}
        self.byteorder = self._byteorder()
        self.checksummed_bytes = sum(record.packed for record in zipped.records.values())
        self.pickle = self.find("data.pkl")
        self.pickled = 0 if self.pickle is None else self.pickle.size

    def find(self, name: str) -> Record | None:
        """A record by its name below the root, which torch looks up without regard to case."""
        full = self._root + name
        return self._zip.records.get(full) or self._lower.get(full.lower())

    def text(self, name: str) -> str | None:
        """What a small record says; None if it is not there, or is not small."""
        record = self.find(name)
        return self._zip.read(record).decode("latin1").strip() if record is not None and record.size <= 16 else None

    def read_pickle(self) -> bytes:
        """The pickle that names the storages; nothing where there is none."""
        return b"" if self.pickle is None else self._zip.read(self.pickle)

    def size(self, storage: Storage) -> int:
        """Bytes of a storage's record."""
        return self.record(storage).size

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """Bytes of a storage."""
        return self._zip.read(self.record(storage), start, stop)

    def verify_checksums(self, storages: Collection[Storage] | None = None) -> Iterator[str]:
        """Compare every record's CRC-32 with the directory's; of storages only those that are asked for."""
        from trackopt.archive.io.checksums import find_damaged

        records = list(self._zip.records.values())
        if storages is not None:
            wanted = {self.record(one).name for one in storages}
            records = [one for one in records if one.name in wanted or f"/{self._folder}/" not in one.name]
        return find_damaged(self._zip, records)

    def oddities(self) -> Iterator[str]:
        """What torch would stumble over, or another program would read differently."""
        strangers = [name for name in self._zip.records if not name.startswith(self._root)]
        if strangers:
            yield f"{len(strangers)} records lie outside of {self._root!r}: {strangers[0]!r}"
        if not self._root:
            yield "its records stand in no folder: torch does not load the file"
        if self.pickle is not None and self.pickle.name != self._root + "data.pkl":
            yield f"its pickle is named {self.pickle.name!r}: torch reads it, other programs find none"
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

    def record(self, storage: Storage) -> Record:
        """The record that a storage is.

        Raises:
            ArchiveError: It is not there.
        """
        record = self.find(f"{self._folder}/{storage.key}")
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
