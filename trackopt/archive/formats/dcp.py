"""What ``torch.distributed.checkpoint`` writes: ``.metadata``, and files in which many small checkpoints stand.

``.metadata`` is a pickle that names for each value the file, the offset and the length of the ``torch.save``
zip that holds it, and for a sharded tensor which parts of the whole there are. Values are read at once; of a
tensor nothing is, until its bytes are asked for.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats.members import prefix_storage_keys
from trackopt.archive.formats.sharded_tensor import Chunk, ShardedRange, StorageMetadata
from trackopt.archive.formats.torch_zip import MAX_PICKLED, ZipSource
from trackopt.archive.io.byte_ranges import RangeSource
from trackopt.archive.io.source import Contents
from trackopt.archive.tree import ITEMSIZE, Global, Storage, Tensor, UnknownObject, contiguous
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MAX_DEPTH, MalformedPickle, check_limits
from trackopt.archive.unpickler.machine import PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

    from trackopt.archive.formats.members import Load, OpenFiles

MAX_PLAIN = 128 << 20
_MAX_RANK = 64
_OWN = ("torch.distributed.checkpoint.", "torch.serialization._get_layout", "pathlib.", "torch.Size", "torch.float")


def load(files: OpenFiles, _: Load) -> Contents:
    """Read the structure of a distributed checkpoint.

    Raises:
        ArchiveError: Its metadata make no sense, or a file that they name is missing.
    """
    return _Reader(files).contents()


class _Reader:
    """Puts the metadata and the files together."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._path = files.directory / ".metadata"
        self._globals: dict[str, None] = {}
        self._problems: list[str] = []
        self._plain = 0
        self._pickled = 0
        metadata = self._metadata()
        self._described: dict[Any, Any] = _dictionary(metadata.get("state_dict_metadata"))
        self._paths = _dictionary(metadata.get("planner_data"))
        self._items: dict[tuple[str, tuple[int, ...]], StorageMetadata] = {}
        for index, info in _dictionary(metadata.get("storage_data")).items():
            place = _state(index)
            offsets = place.get("offset")
            offsets = offsets if isinstance(offsets, tuple) and all(map(_is_count, offsets)) else ()
            self._items[str(place.get("fqn")), offsets] = self._item(_state(info))

    def contents(self) -> Contents:
        tree: dict[str, Any] = {}
        for name, described in self._described.items():
            told = self._paths.get(name)
            path: tuple[Any, ...] = told if _is_path(told) else (name,)
            if not _put(tree, path, self._value(str(name), described)):
                self._problems.append(f"{name!r} stands where another value stands")
        source = _Items(self._files, list(self._items.values()))
        try:
            whole = check_limits(_lists(tree))
        except MalformedPickle as error:
            raise self._broken(str(error)) from error
        return Contents("DCP", whole, source, tuple(self._globals), self._problems, self._files)

    def _metadata(self) -> dict[Any, Any]:
        machine = PickleMachine(self._files.text(".metadata"), constructors.construct, constructors.storage)
        try:
            found = _state(machine.run(OPERATIONS))
        except MalformedPickle as error:
            raise self._broken(str(error)) from error
        if not isinstance(found.get("state_dict_metadata"), dict):
            raise self._broken("they describe no state dict")
        self._globals.update({name: None for name in machine.globals if not name.startswith(_OWN)})
        return found

    def _item(self, info: dict[Any, Any]) -> StorageMetadata:
        offset: Any = info.get("offset")
        length: Any = info.get("length")
        path, file = self._files.open(info.get("relative_path"))
        end = os.fstat(file).st_size
        if not (_is_count(offset) and _is_count(length)) or offset + length > end:
            raise self._broken(f"{length} bytes are said to be at {offset} in {path.name!r}, which has {end:,}")
        if info.get("transform_descriptors"):
            raise self._broken(f"{path.name!r} is compressed, which is not read")
        return StorageMetadata(path, file, offset, length)

    def _value(self, name: str, described: Any) -> Any:
        kind = described.name.rpartition(".")[2] if isinstance(described, UnknownObject) else ""
        if kind == "TensorStorageMetadata":
            return self._tensor(name, described.state)
        item = self._items.get((name, ()))
        if kind != "BytesStorageMetadata" or item is None:
            self._problems.append(f"{name!r} is described, but not in any file")
            return UnknownObject("missing")
        self._plain += item.length
        if self._plain > MAX_PLAIN:
            raise self._broken(f"values besides tensors take more than {MAX_PLAIN:,} bytes")
        contents = item.contents()
        self._pickled += contents.source.pickled if isinstance(contents.source, ZipSource) else 0
        if self._pickled > MAX_PICKLED:
            raise self._broken(f"the pickles of values besides tensors take more than {MAX_PICKLED:,} bytes")
        self._globals.update(dict.fromkeys(contents.globals))
        self._problems.extend(f"{name}: {line}" for line in contents.problems)
        return prefix_storage_keys(contents.tree, name, contents.source)

    def _tensor(self, name: str, state: Any) -> Tensor:
        """A tensor that knows its parts."""
        dtype, shape, boxes = self._shape(name, state)
        pieces = []
        for offsets, sizes in boxes:
            item = self._items.get((name, offsets))
            inside = all(at + size <= whole for at, size, whole in zip(offsets, sizes, shape, strict=True))
            if item is None or not inside or math.prod(sizes) * ITEMSIZE[dtype] > item.length:
                self._problems.append(f"the part of {name!r} at {list(offsets)} is in no file, or of another size")
                continue
            pieces.append(Chunk(offsets, sizes, item))
        if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
            self._problems.append(f"the parts of {name!r} do not make up its shape {list(shape)}")
        region = ShardedRange(name, dtype, shape, tuple(pieces))
        return Tensor(Storage(name, dtype, "cpu", region.size, region), dtype, shape, contiguous(shape))

    def _shape(self, name: str, state: Any) -> tuple[str, tuple[int, ...], list[tuple[Any, Any]]]:
        try:
            dtype = _state_tuple(state["properties"])[0]
            shape = _counts(state["size"])
            chunks = [_state(chunk) for chunk in state["chunks"]]
            boxes = [(_counts(chunk["offsets"]), _counts(chunk["sizes"])) for chunk in chunks]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._broken(f"the description of {name!r} makes no sense") from error
        known = isinstance(dtype, Global) and dtype.name.removeprefix("torch.") in ITEMSIZE
        if not known or any({len(offsets), len(sizes)} != {len(shape)} for offsets, sizes in boxes):
            raise self._broken(f"the description of {name!r} makes no sense")
        return dtype.name.removeprefix("torch."), shape, boxes

    def _broken(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self._path}: {what}; the checkpoint is damaged, copy it again or use another one")


class _Items(RangeSource):
    """The checksums of all the small checkpoints."""

    def __init__(self, files: OpenFiles, items: list[StorageMetadata]) -> None:
        super().__init__(files.directory)
        self._items = items
        self.checksummed_bytes = sum(item.length for item in items)

    def verify_checksums(self) -> Iterator[str]:
        """One line for each part whose bytes are not those that were written."""
        for item in self._items:
            try:
                yield from (
                    f"{item.path.name} at {item.offset:,}: {line}" for line in item.contents().source.verify_checksums()
                )
            except ArchiveError as error:
                yield str(error).removeprefix(f"{self.path}/")


def _state(node: Any) -> dict[Any, Any]:
    """The attributes of a described object; none if it has no such."""
    return _dictionary(node.state) if isinstance(node, UnknownObject) else {}


def _is_path(value: Any) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple) and 0 < len(value) < MAX_DEPTH and all(isinstance(key, str | int) for key in value)


def _dictionary(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _state_tuple(node: Any) -> tuple[Any, ...]:
    return tuple(node.state) if isinstance(node, UnknownObject) and isinstance(node.state, tuple) else ()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_RANK or not all(map(_is_count, value)):
        raise ValueError("no sizes")
    return value


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> bool:
    """Set a value at a path of keys and indices; False if something else is in the way."""
    inner: Any = tree
    for key in path[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
    return isinstance(inner, dict) and inner.setdefault(path[-1], value) is value


def _lists(node: Any) -> Any:
    """Dictionaries that have indices for keys are lists."""
    if not isinstance(node, dict) or not node:
        return node
    inside = {key: _lists(value) for key, value in node.items()}
    if all(isinstance(key, int) for key in inside):
        return [inside[key] for key in sorted(inside)]
    return inside
