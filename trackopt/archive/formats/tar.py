"""The files that ``torch.save`` wrote in its first years: a tar with four members. Nothing is extracted.

``storages`` holds a pickled count, then for each storage a pickle of its key, location and class, its number of
elements and its data; then a pickle of the views of other storages. ``tensors`` holds a count, then for each tensor a
pickle of its key, storage and class, and its layout as integers. ``pickle`` is the object; its persistent ids are the
tensors' keys.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats import legacy
from trackopt.archive.formats.signatures import is_tar
from trackopt.archive.io.byte_ranges import ByteRange, BytesRange, FileRange
from trackopt.archive.io.source import Contents, RangeSource
from trackopt.archive.tree import ITEMSIZE, Global, Storage, Tensor, UnknownObject
from trackopt.archive.unpickler import tensor_constructors
from trackopt.archive.unpickler.constructors import construct
from trackopt.archive.unpickler.limits import Limits, MalformedPickle, PickleLimitExceeded, make_error
from trackopt.archive.unpickler.tensor_constructors import is_size, string
from trackopt.archive.unpickler.unpickle import unpickle
from trackopt.errors import ArchiveError, ForeignFormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.archive.io.file import File

_BLOCK_BYTES = 512
_MAX_MEMBERS = 100
_MAX_ITEMS = 400_000
_ITEM_LIMITS = Limits(operations=1000)  # for the pickle of one storage or tensor
_MEMBERS = ("storages", "tensors", "pickle")
_REGULAR_TYPES = (b"0", b"\0")


def load(path: Path, file: File) -> Contents:
    """Read the members in place; the tensors stay in the file.

    Raises:
        ForeignFormatError: It is no checkpoint.
        ArchiveError: It is malformed.
    """
    problems: list[str] = []
    archive = FileRange(path, file)
    if archive.read(0, 1) == b"\x80":
        problems.append("it is a tar file that begins as a pickle does: torch reads the tar, other programs the pickle")
    members = _find_members(archive, problems)
    missing = [name for name in _MEMBERS if name not in members]
    if len(missing) == len(_MEMBERS):
        raise ForeignFormatError(f"{path}: a tar file without a member 'storages' is not a checkpoint; unpack it first")
    if missing:
        raise ArchiveError(f"{path}: its member {missing[0]!r} is missing, it was cut short; use another checkpoint")
    reader = Reader(problems)
    try:
        reader.read_storages(members["storages"])
        reader.read_tensors(members["tensors"])
        tree, _ = reader.unpickle(members["pickle"], 0, None)
    except MalformedPickle as error:
        raise make_error(path, error) from error
    return Contents("torch tar", tree, RangeSource(path), tuple(reader.globals), problems)


def _find_members(archive: FileRange, problems: list[str]) -> dict[str, ByteRange]:
    """Return the regular files among the first members; of several with one name the last, as in ``tarfile``."""
    members: dict[str, ByteRange] = {}
    position = 0
    for _ in range(_MAX_MEMBERS):
        if position + _BLOCK_BYTES > archive.size:
            break
        header = archive.read(position, position + _BLOCK_BYTES)
        size = _octal(header[124:136])
        if not is_tar(header) or size is None:
            break
        name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape").removeprefix("./")
        position += _BLOCK_BYTES
        if header[156:157] in _REGULAR_TYPES:
            if name in members:
                problems.append(f"two members of the tar file are named {name!r}")
            members[name] = archive.slice(position, position + size)
            position += -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
        else:
            problems.append(f"member {name!r} of the tar file is no regular file; it was skipped")
            position += -(-size // _BLOCK_BYTES) * _BLOCK_BYTES if header[156:157] in b"xgLKS7" else 0
    return members


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if text and all(digit in b"01234567" for digit in text) else None


class Reader:
    """The values, storages and tensors of the members.

    Args:
        problems: Where to add what is wrong although the rest can be read.

    Attributes:
        globals: Every name in the pickles, in order.
    """

    def __init__(self, problems: list[str]) -> None:
        self.globals: dict[str, None] = {}
        self._problems = problems
        self._is_cut = False
        self._storages: dict[Any, Storage] = {}
        self._tensors: dict[Any, Tensor] = {}

    def unpickle(self, byte_range: ByteRange, position: int, limits: Limits | None = _ITEM_LIMITS) -> tuple[Any, int]:
        """Return the value of the pickle at a position, and where it ends."""
        data = byte_range.slice(position, byte_range.size)
        pickled = unpickle(data, legacy.load_nested, self._persistent, limits)
        self.globals.update(dict.fromkeys(pickled.globals))
        return pickled.tree, position + pickled.end

    def read_storages(self, byte_range: ByteRange) -> None:
        """Locate the data of each storage; of a truncated file, of those that are left."""
        try:
            position = self._read_items(byte_range, self._read_storage)
            views, _ = self.unpickle(byte_range, position, None)
        except (ArchiveError, MalformedPickle) as error:
            if isinstance(error, PickleLimitExceeded):
                raise
            self._problems.append("the data of its storages are damaged, or cut short")
            self._is_cut = True
            return
        for view in views if isinstance(views, list) else ():
            target, root, offset, count = _parts(view, 4)
            self._storages[target] = _make_view(self._find_storage(root), target, offset, count)

    def read_tensors(self, byte_range: ByteRange) -> None:
        """Read each tensor's layout."""
        self._read_items(byte_range, self._read_tensor)

    def _read_items(self, byte_range: ByteRange, read: Callable[[ByteRange, int], int]) -> int:
        count, position = self.unpickle(byte_range, 0)
        if not is_size(count) or count > _MAX_ITEMS:
            raise MalformedPickle(f"a member announces {count} parts")
        for _ in range(count):
            position = read(byte_range, position)
        return position

    def _read_storage(self, byte_range: ByteRange, position: int) -> int:
        value, position = self.unpickle(byte_range, position)
        key, location, kind = _parts(value, 3)
        (count,) = _numbers(byte_range, position, 1)
        declared = tensor_constructors.storage(("storage", kind, key, location, count))
        if not isinstance(declared, Storage):
            raise MalformedPickle(f"storage {key!r} has no class")
        start = position + 8
        part = byte_range.slice(start, start + declared.nbytes)
        storage = Storage(declared.key, declared.dtype, declared.device, declared.nbytes, part)
        self._storages[_key(key)] = storage
        return start + declared.nbytes

    def _read_tensor(self, byte_range: ByteRange, position: int) -> int:
        value, position = self.unpickle(byte_range, position)
        key, storage, kind = _parts(value, 3)
        (rank,) = struct.unpack("<i", byte_range.read(position, position + 4))  # torch wrote eight bytes, reads four
        if not 0 <= rank <= 64:
            raise MalformedPickle(f"tensor {key!r} has {rank} dimensions")
        layout = _numbers(byte_range, position + 8, 2 * rank + 1)
        shape, stride, offset = layout[:rank], layout[rank:-1], layout[-1]
        base = self._find_storage(storage, kind if self._is_cut else None)
        self._tensors[_key(key)] = construct("torch._utils._rebuild_tensor", (base, offset, shape, stride))
        return position + 8 + 8 * len(layout)

    def _find_storage(self, key: Any, kind: Any = None) -> Storage:
        """Return a storage; in its place, for a class of tensors, one without data."""
        if _key(key) in self._storages:
            return self._storages[key]
        name = kind.name.rpartition(".")[2].removesuffix("Tensor") if isinstance(kind, Global) else ""
        if name not in tensor_constructors.STORAGES:
            raise MalformedPickle(f"storage {key!r} is used, but missing")
        return Storage(string(key), tensor_constructors.STORAGES[name], "cpu", 1, BytesRange(b""))

    def _persistent(self, key: Any) -> Any:
        if isinstance(key, tuple) and key:
            return key[0]  # the class of a module, with its source code
        if isinstance(key, str) and key.isdecimal() and len(key) < 20:
            key = int(key)
        node = self._tensors.get(_key(key)) or self._storages.get(_key(key))
        return UnknownObject("persistent id", (key,)) if node is None else node


def _key(key: Any) -> Any:
    """Return a key if it can be looked up: old files have numbers, some have text."""
    if not isinstance(key, int | str | bytes):
        raise MalformedPickle("a key is neither a number nor text")
    return key


def _parts(value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or len(value) != count:
        raise MalformedPickle(f"{count} values were expected, another type was found")
    return tuple(value)


def _numbers(byte_range: ByteRange, position: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}q", byte_range.read(position, position + 8 * count))


def _make_view(root: Storage, key: Any, offset: Any, count: Any) -> Storage:
    size = ITEMSIZE[root.dtype]
    if root.byte_range is None or not (is_size(offset) and is_size(count)):
        raise MalformedPickle(f"storage {key!r} is a view with an offset or a size that makes no sense")
    part = root.byte_range.slice(offset * size, (offset + count) * size)
    return Storage(string(_key(key)), root.dtype, root.device, count * size, part)
