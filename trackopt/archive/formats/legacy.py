"""The files that ``torch.save`` wrote before 1.6, and still can: five pickles, then the data.

The pickles are a magic number, a version, facts about the writer's machine, the object, and the storages' keys. After
them comes the data of each storage, preceded by its number of elements. A storage that is pickled by itself embeds
such a file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.byte_ranges import ByteRange, FileRange
from trackopt.archive.io.source import Contents, RangeSource
from trackopt.archive.tree import ITEMSIZE, Storage
from trackopt.archive.unpickler import tensor_constructors
from trackopt.archive.unpickler.limits import Limits, MalformedPickle, make_error
from trackopt.archive.unpickler.tensor_constructors import is_size, string
from trackopt.archive.unpickler.unpickle import unpickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.archive.io.file import File

MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_NESTED_LIMITS = Limits(operations=100)  # for each pickle of one storage


def load(path: Path, file: File) -> Contents:
    """Read the pickles and find the storages; the tensors stay in the file.

    Raises:
        ArchiveError: It is malformed.
    """
    try:
        stream = Stream(FileRange(path, file))
    except MalformedPickle as error:
        raise make_error(path, error) from error
    source = RangeSource(path, stream.byteorder)
    return Contents("torch legacy", stream.tree, source, tuple(stream.globals), stream.problems)


def load_nested(byte_range: ByteRange) -> Any:
    """Return the object of a file that is embedded in another file's pickle: a storage."""
    stream = Stream(byte_range, _NESTED_LIMITS)
    if stream.byteorder != "little":
        raise MalformedPickle("a storage in it is big-endian")
    tree = stream.tree
    if isinstance(tree, Storage) and tree.byte_range is not None:
        return Storage(tree.byte_range.key, tree.dtype, tree.device, tree.nbytes, tree.byte_range)
    return tree


class Stream:
    """One such file.

    Args:
        byte_range: Its bytes.
        limits: What reading each of its pickles may take; by default in proportion to its bytes.

    Attributes:
        tree: The object in it.
        byteorder: ``"little"`` or ``"big"``.
        globals: Every name in its pickles, in order.
        problems: What is wrong although the file can be read, one line each.
    """

    def __init__(self, byte_range: ByteRange, limits: Limits | None = None) -> None:
        self._byte_range = byte_range
        self._limits = limits
        self._position = 0
        self._data: dict[str, StorageData] = {}
        self.globals: dict[str, None] = {}
        self.problems: list[str] = []
        if self._pickle() != MAGIC or self._pickle() != _VERSION:
            raise MalformedPickle("torch did not write it")
        facts = self._pickle()
        self.byteorder = "big" if isinstance(facts, dict) and facts.get("little_endian") is False else "little"
        self.tree = self._pickle()
        self._locate_storages(self._pickle())

    def _pickle(self) -> Any:
        data = self._byte_range.slice(self._position, self._byte_range.size)
        pickled = unpickle(data, load_nested, self._persistent, self._limits)
        self._position += pickled.end
        self.globals.update(dict.fromkeys(pickled.globals))
        return pickled.tree

    def _persistent(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) == 4 and key[0] in ("module", b"module"):
            return key[1]  # the class of a module; its source code follows
        view = key[5] if isinstance(key, tuple) and len(key) == 6 else None
        storage = tensor_constructors.storage(key)
        if not isinstance(storage, Storage):
            return storage
        data = self._data.setdefault(storage.key, StorageData(storage))
        storage = Storage(storage.key, storage.dtype, storage.device, storage.nbytes, data)
        return storage if view is None else _make_view(storage, data, view)

    def _locate_storages(self, keys: Any) -> None:
        """Locate the data of each storage, in the order of their keys."""
        if not isinstance(keys, list):
            raise MalformedPickle("it has no list of its storages")
        for key in keys:
            data = self._data.get(string(key))
            if data is None:
                raise MalformedPickle(f"it lists a storage {key!r} that nothing uses")
            if self._position + 8 > self._byte_range.size:
                self.problems.append(f"the file ends before the data of storage {key!r}, it was cut short")
                return
            (count,) = struct.unpack("<q", self._byte_range.read(self._position, self._position + 8))
            if not 0 <= count < 1 << 60:
                self.problems.append(f"storage {key!r} has {count} elements; what follows is lost")
                return
            if count * data.itemsize != data.nbytes:
                self.problems.append(
                    f"storage {key!r} has {count:,} elements, the pickle says {data.nbytes // data.itemsize:,}"
                )
            start = self._position + 8
            self._position = start + count * data.itemsize
            data.locate(self._byte_range.slice(start, self._position))
        if rest := max(0, self._byte_range.size - self._position):
            self.problems.append(f"{rest:,} bytes follow the last storage; torch ignores them, other programs may not")


class StorageData:
    """A storage's bytes, whose offset is known once all the pickles have been read."""

    def __init__(self, storage: Storage) -> None:
        self.key = storage.key
        self.size = 0
        self.nbytes = storage.nbytes
        self.itemsize = ITEMSIZE[storage.dtype]
        self._byte_range: ByteRange | None = None

    def locate(self, byte_range: ByteRange) -> None:
        """Set where the bytes are."""
        self._byte_range = byte_range
        self.size = byte_range.size
        self.key = byte_range.key

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``."""
        if self._byte_range is None:
            raise ArchiveError(f"the data of storage {self.key!r} is missing; use another checkpoint")
        return self._byte_range.read(start, stop)

    def slice(self, start: int, stop: int) -> ByteRange:
        """Return a part of it; its own offset may be unknown yet."""
        return StoragePart(self, start, stop)


class StoragePart:
    """A part of a storage."""

    def __init__(self, data: StorageData, start: int, stop: int) -> None:
        self._data = data
        self._start = start
        self._stop = stop
        self.key = f"{data.key}+{start}"

    @property
    def size(self) -> int:
        """The number of its bytes that are in the file."""
        return max(0, min(self._stop, self._data.size) - self._start)

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``."""
        return self._data.read(self._start + start, self._start + stop)

    def slice(self, start: int, stop: int) -> ByteRange:
        """Return a part of this one."""
        return StoragePart(self._data, self._start + start, min(self._start + stop, self._stop))


def _make_view(storage: Storage, data: StorageData, view: Any) -> Storage:
    """Return a storage that is a part of another one, as in files of the oldest versions."""
    key, offset, count = view
    size = ITEMSIZE[storage.dtype]
    if not (is_size(offset) and is_size(count)):
        raise MalformedPickle(f"a view of storage {storage.key!r} has an offset or a size that makes no sense")
    part = data.slice(offset * size, (offset + count) * size)
    return Storage(string(key), storage.dtype, storage.device, count * size, part)
