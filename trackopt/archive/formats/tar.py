"""The files that ``torch.save`` wrote in its first years: a tar with four members. Nothing is extracted.

``storages`` holds a pickled count, then for each storage a pickle of its key, location and class, its number
of elements and its data; then a pickle of those that look into others. ``tensors`` holds a count, then for
each tensor a pickle of its key, storage and class, and its layout as integers. ``pickle`` is the object,
with the tensors' keys as persistent ids.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats.detect import is_tar
from trackopt.archive.io.byte_ranges import ByteRange, FileRegion, RangeSource
from trackopt.archive.io.source import Contents
from trackopt.archive.tree import ITEMSIZE, Global, Storage, Tensor, UnknownObject
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import MAX_OPERATIONS, PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_BLOCK = 512
_MAX_MEMBERS = 100
_MAX_ITEMS = 400_000
_MAX_ITEM = 1000  # operations in the pickle of one storage or tensor
_MEMBERS = ("storages", "tensors", "pickle")
_PLAIN = (b"0", b"\0")


def load(path: Path, file: int) -> Contents:
    """Read the members in place; the tensors stay in the file.

    Raises:
        ArchiveError: It is malformed, or no checkpoint.
    """
    problems: list[str] = []
    whole = FileRegion(path, file)
    if whole.read(0, 1) == b"\x80":
        problems.append("it is a tar file that begins as a pickle does: torch reads the tar, other programs the pickle")
    found = _members(whole, problems)
    missing = [name for name in _MEMBERS if name not in found]
    if missing:
        raise ArchiveError(f"{path}: a tar file without a member {missing[0]!r} is not a checkpoint; unpack it first")
    reader = Reader()
    try:
        reader.read_storages(found["storages"])
        reader.read_tensors(found["tensors"])
        tree, _ = reader.unpickle(found["pickle"], 0, MAX_OPERATIONS)
    except MalformedPickle as error:
        raise ArchiveError(f"{path}: its pickle cannot be read: {error}; use another checkpoint") from error
    return Contents("torch tar", tree, RangeSource(path), tuple(reader.globals), problems)


def _members(whole: FileRegion, problems: list[str]) -> dict[str, ByteRange]:
    """The plain files among the first members; of several with one name the last, as ``tarfile`` has it."""
    found: dict[str, ByteRange] = {}
    position = 0
    for _ in range(_MAX_MEMBERS):
        if position + _BLOCK > whole.size:
            break
        header = whole.read(position, position + _BLOCK)
        size = _octal(header[124:136])
        if not is_tar(header) or size is None:
            break
        name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape").removeprefix("./")
        position += _BLOCK
        if header[156:157] in _PLAIN:
            if name in found:
                problems.append(f"two members of the tar file are named {name!r}")
            found[name] = whole.slice(position, position + size)
            position += -(-size // _BLOCK) * _BLOCK
        else:
            problems.append(f"member {name!r} of the tar file is no plain file; it was passed by")
            position += -(-size // _BLOCK) * _BLOCK if header[156:157] in b"xgLKS7" else 0
    return found


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if text and all(digit in b"01234567" for digit in text) else None


class Reader:
    """What the members say.

    Attributes:
        globals: Every name in the pickles, in order.
    """

    def __init__(self) -> None:
        self.globals: dict[str, Global] = {}
        self._storages: dict[Any, Storage] = {}
        self._tensors: dict[Any, Tensor] = {}

    def unpickle(self, region: ByteRange, position: int, limit: int = _MAX_ITEM) -> tuple[Any, int]:
        """The value of the pickle at a position, and where it ends."""
        machine = PickleMachine(region.slice(position, region.size), constructors.construct, self._persistent)
        value = machine.run(OPERATIONS, limit)
        self.globals.update(machine.globals)
        return value, position + machine.offset

    def read_storages(self, region: ByteRange) -> None:
        """Find each storage's data."""
        position = self._each(region, self._storage)
        views, _ = self.unpickle(region, position, MAX_OPERATIONS)
        for view in views if isinstance(views, list) else ():
            target, root, offset, count = _parts(view, 4)
            self._storages[target] = _viewed(self._known(root), target, offset, count)

    def read_tensors(self, region: ByteRange) -> None:
        """Read each tensor's layout."""
        self._each(region, self._tensor)

    def _each(self, region: ByteRange, read: Callable[[ByteRange, int], int]) -> int:
        count, position = self.unpickle(region, 0)
        if not constructors.is_size(count) or count > _MAX_ITEMS:
            raise MalformedPickle(f"a member announces {count} parts")
        for _ in range(count):
            position = read(region, position)
        return position

    def _storage(self, region: ByteRange, position: int) -> int:
        value, position = self.unpickle(region, position)
        key, location, kind = _parts(value, 3)
        (count,) = _numbers(region, position, 1)
        declared = constructors.storage(("storage", kind, key, location, count))
        if not isinstance(declared, Storage):
            raise MalformedPickle(f"storage {key!r} has no class")
        start = position + 8
        part = region.slice(start, start + declared.nbytes)
        place = Storage(declared.key, declared.dtype, declared.device, declared.nbytes, part)
        self._storages[_key(key)] = place
        return start + declared.nbytes

    def _tensor(self, region: ByteRange, position: int) -> int:
        value, position = self.unpickle(region, position)
        key, storage, _ = _parts(value, 3)
        (rank,) = struct.unpack("<i", region.read(position, position + 4))  # torch wrote eight bytes, reads four
        if not 0 <= rank <= 64:
            raise MalformedPickle(f"tensor {key!r} has {rank} dimensions")
        layout = _numbers(region, position + 8, 2 * rank + 1)
        shape, stride, offset = layout[:rank], layout[rank:-1], layout[-1]
        base = self._known(storage)
        self._tensors[_key(key)] = constructors.construct("torch._utils._rebuild_tensor", (base, offset, shape, stride))
        return position + 8 + 8 * len(layout)

    def _known(self, key: Any) -> Storage:
        if _key(key) not in self._storages:
            raise MalformedPickle(f"storage {key!r} is used and not there")
        return self._storages[key]

    def _persistent(self, key: Any) -> Any:
        if isinstance(key, tuple) and key:
            return key[0]  # the class of a module, with its source code
        if isinstance(key, str) and key.isdecimal() and len(key) < 20:
            key = int(key)
        found = self._tensors.get(_key(key)) or self._storages.get(_key(key))
        return UnknownObject("persistent id", (key,)) if found is None else found


def _key(key: Any) -> Any:
    """A key that can be looked up: old files have numbers, some have text."""
    if not isinstance(key, int | str | bytes):
        raise MalformedPickle("a key is neither a number nor text")
    return key


def _parts(value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or len(value) != count:
        raise MalformedPickle(f"something else stands where {count} values were expected")
    return tuple(value)


def _numbers(region: ByteRange, position: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}q", region.read(position, position + 8 * count))


def _viewed(root: Storage, key: Any, offset: Any, count: Any) -> Storage:
    size = ITEMSIZE[root.dtype]
    if root.region is None or not (constructors.is_size(offset) and constructors.is_size(count)):
        raise MalformedPickle(f"storage {key!r} looks into another one at a place that makes no sense")
    part = root.region.slice(offset * size, (offset + count) * size)
    return Storage(constructors.string(_key(key)), root.dtype, root.device, count * size, part)
