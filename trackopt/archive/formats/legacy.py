"""The files that ``torch.save`` wrote before 1.6, and still does when told to: five pickles, then the data.

The pickles are a magic number, a version, facts about the writer's machine, the object, and the storages'
keys. Behind them each storage's data follows its number of elements. A storage that is pickled by itself
embeds such a file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.byte_ranges import ByteRange, FileRegion, RangeSource
from trackopt.archive.io.source import Contents
from trackopt.archive.tree import ITEMSIZE, Global, Storage
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import MAX_OPERATIONS, PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MAX_EMBEDDED = 64  # operations in the pickle of one storage


def load(path: Path, file: int) -> Contents:
    """Read the pickles and find the storages; the tensors stay in the file.

    Raises:
        ArchiveError: It is malformed.
    """
    try:
        stream = Stream(FileRegion(path, file), MAX_OPERATIONS)
    except MalformedPickle as error:
        raise ArchiveError(f"{path}: its pickle cannot be read: {error}; use another checkpoint") from error
    globals_ = tuple(stream.globals)
    return Contents("torch legacy", stream.tree, RangeSource(path, stream.byteorder), globals_, stream.problems)


class Stream:
    """One such file.

    Args:
        region: Its bytes.
        limit: Operations that each of its pickles may take.

    Attributes:
        tree: The object in it.
        byteorder: ``"little"`` or ``"big"``.
        globals: Every name in its pickles, in order.
        problems: What is wrong although it can be read, one line each.
    """

    def __init__(self, region: ByteRange, limit: int) -> None:
        self._region = region
        self._limit = limit
        self._position = 0
        self._data: dict[str, StorageData] = {}
        self.globals: dict[str, Global] = {}
        self.problems: list[str] = []
        if self._pickle() != MAGIC or self._pickle() != _VERSION:
            raise MalformedPickle("it is none of torch's")
        facts = self._pickle()
        self.byteorder = "big" if isinstance(facts, dict) and facts.get("little_endian") is False else "little"
        self.tree = self._pickle()
        self._place(self._pickle())

    def _pickle(self) -> Any:
        machine = PickleMachine(
            self._region.slice(self._position, self._region.size), constructors.construct, self._persistent
        )
        value = machine.run(OPERATIONS, self._limit)
        self._position += machine.offset
        self.globals.update(machine.globals)
        return value

    def _persistent(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) == 4 and key[0] in ("module", b"module"):
            return key[1]  # the class of a module; its source code stands behind it
        view = key[5] if isinstance(key, tuple) and len(key) == 6 else None
        found = constructors.storage(key)
        if not isinstance(found, Storage):
            return found
        data = self._data.setdefault(found.key, StorageData(found))
        whole = Storage(found.key, found.dtype, found.device, found.nbytes, data)
        return whole if view is None else _viewed(whole, data, view)

    def _place(self, keys: Any) -> None:
        """Find each storage's data, in the order of their keys."""
        if not isinstance(keys, list):
            raise MalformedPickle("it has no list of its storages")
        for key in keys:
            data = self._data.get(constructors.string(key))
            if data is None:
                raise MalformedPickle(f"it lists a storage {key!r} that is used nowhere")
            if self._position + 8 > self._region.size:
                self.problems.append(f"the file ends before the data of storage {key!r}, it was cut short")
                return
            (count,) = struct.unpack("<q", self._region.read(self._position, self._position + 8))
            if not 0 <= count < 1 << 60:
                raise MalformedPickle(f"storage {key!r} has {count} elements")
            start = self._position + 8
            self._position = start + count * data.itemsize
            data.place(self._region.slice(start, self._position))
        if self._position < self._region.size:
            self.problems.append(f"{self._region.size - self._position:,} bytes follow the last storage; torch ignores "
                                 "them, other programs may not")  # fmt: skip


class StorageData:
    """A storage's bytes, whose place is known once all the pickles have been read."""

    def __init__(self, storage: Storage) -> None:
        self.key = storage.key
        self.size = 0
        self.itemsize = ITEMSIZE[storage.dtype]
        self._region: ByteRange | None = None

    def place(self, region: ByteRange) -> None:
        """Say where the bytes are."""
        self._region = region
        self.size = region.size
        self.key = region.key

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``."""
        if self._region is None:
            raise ArchiveError(f"the data of storage {self.key!r} is missing; use another checkpoint")
        return self._region.read(start, stop)

    def slice(self, start: int, stop: int) -> ByteRange:
        """A stretch of it, which may be asked for before the place is known."""
        return StoragePart(self, start, stop)


class StoragePart:
    """A stretch of a storage."""

    def __init__(self, whole: StorageData, start: int, stop: int) -> None:
        self._whole = whole
        self._start = start
        self._stop = stop
        self.key = f"{whole.key}+{start}"

    @property
    def size(self) -> int:
        """How many of its bytes are there."""
        return max(0, min(self._stop, self._whole.size) - self._start)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``."""
        return self._whole.read(self._start + start, self._start + stop)

    def slice(self, start: int, stop: int) -> ByteRange:
        """A stretch of this one."""
        return StoragePart(self._whole, self._start + start, min(self._start + stop, self._stop))


def _viewed(whole: Storage, data: StorageData, view: Any) -> Storage:
    """A storage that is a stretch of another one, as files of the oldest versions have it."""
    key, offset, count = view
    size = ITEMSIZE[whole.dtype]
    if not (constructors.is_size(offset) and constructors.is_size(count)):
        raise MalformedPickle(f"storage {whole.key!r} is looked into at a place that makes no sense")
    part = data.slice(offset * size, (offset + count) * size)
    return Storage(constructors.string(key), whole.dtype, whole.device, count * size, part)


def embedded(region: ByteRange) -> Any:
    """The object in a file that stands in another one's pickle: a storage."""
    stream = Stream(region, _MAX_EMBEDDED)
    if stream.byteorder != "little":
        raise MalformedPickle("a storage in it is big-endian")
    tree = stream.tree
    if isinstance(tree, Storage) and tree.region is not None:
        return Storage(tree.region.key, tree.dtype, tree.device, tree.nbytes, tree.region)
    return tree
