"""The directories of ``torch.distributed.checkpoint``: ``.metadata``, and files of many small checkpoints each.

``.metadata`` is a pickle with the file, the offset and the length of the ``torch.save`` zip of each value, and with the
chunks of each sharded tensor. Values are read at once, tensors on demand.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats import legacy
from trackopt.archive.formats.members import prefix_storage_keys
from trackopt.archive.formats.sharded_tensor import Chunk, ShardedRange, StorageMetadata
from trackopt.archive.formats.zip_source import MAX_NESTED_PICKLE_BYTES, ZipSource
from trackopt.archive.io.source import Contents, RangeSource
from trackopt.archive.tree import ITEMSIZE, Global, Storage, Tensor, UnknownObject, contiguous_strides
from trackopt.archive.unpickler.limits import MAX_DEPTH, MalformedPickle, PickleLimitExceeded, check_limits, make_error
from trackopt.archive.unpickler.tensor_constructors import is_size
from trackopt.archive.unpickler.unpickle import unpickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

    from trackopt.archive.io.open_files import OpenFiles

_MAX_VALUE_BYTES = 128 << 20  # of the values that are no tensors
_MAX_RANK = 64
_DCP_GLOBALS = (
    "torch.distributed.checkpoint.",
    "torch.serialization._get_layout",
    "pathlib.",
    "torch.Size",
    "torch.float",
)


def load(files: OpenFiles) -> Contents:
    """Read the structure of a distributed checkpoint.

    Raises:
        ArchiveError: Its metadata is invalid, or a file that it names is missing.
    """
    return _Reader(files).load()


class _Reader:
    """Combine the metadata and the files."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._path = files.directory / ".metadata"
        self._globals: dict[str, None] = {}
        self._problems: list[str] = []
        self._value_bytes = 0
        self._pickle_bytes = 0
        metadata = self._read_metadata()
        self._described: dict[Any, Any] = _as_dict(metadata.get("state_dict_metadata"))
        self._paths = _as_dict(metadata.get("planner_data"))
        self._items: dict[tuple[str, tuple[int, ...]], StorageMetadata] = {}
        for index, info in _as_dict(metadata.get("storage_data")).items():
            index_state = _state(index)
            offsets = index_state.get("offset")
            offsets = offsets if isinstance(offsets, tuple) and all(map(is_size, offsets)) else ()
            self._items[str(index_state.get("fqn")), offsets] = self._locate(_state(info))

    def load(self) -> Contents:
        tree: dict[str, Any] = {}
        for name, described in self._described.items():
            planned_path = self._paths.get(name)
            path: tuple[Any, ...] = planned_path if _is_path(planned_path) else (name,)
            if not _insert(tree, path, self._read_value(str(name), described)):
                self._problems.append(f"{name!r} has the path of another value")
        source = _ItemsSource(self._files, list(self._items.values()))
        try:
            checked = check_limits(_restore_lists(tree))
        except PickleLimitExceeded as error:
            raise make_error(self._path, error, "its description") from error
        except MalformedPickle as error:
            raise self._make_error(str(error)) from error
        return Contents("DCP", checked, source, tuple(self._globals), self._problems, self._files)

    def _read_metadata(self) -> dict[Any, Any]:
        try:
            pickled = unpickle(self._files.read_all(".metadata"), legacy.load_nested)
        except PickleLimitExceeded as error:
            raise make_error(self._path, error, "its description") from error
        except MalformedPickle as error:
            raise self._make_error(str(error)) from error
        metadata = _state(pickled.tree)
        if not isinstance(metadata.get("state_dict_metadata"), dict):
            raise self._make_error("it describes no state dict")
        self._globals.update({name: None for name in pickled.globals if not name.startswith(_DCP_GLOBALS)})
        return metadata

    def _locate(self, info: dict[Any, Any]) -> StorageMetadata:
        offset: Any = info.get("offset")
        length: Any = info.get("length")
        path, file = self._files.open(info.get("relative_path"))
        end = file.size
        if not (is_size(offset) and is_size(length)) or offset + length > end:
            raise self._make_error(f"{length} bytes at {offset} exceed {path.name!r}, which has {end:,}")
        if info.get("transform_descriptors"):
            raise self._make_error(f"{path.name!r} is compressed, which is not supported")
        return StorageMetadata(path, file, offset, length)

    def _read_value(self, name: str, described: Any) -> Any:
        kind = described.name.rpartition(".")[2] if isinstance(described, UnknownObject) else ""
        if kind == "TensorStorageMetadata":
            return self._read_tensor(name, described.state)
        item = self._items.get((name, ()))
        if kind != "BytesStorageMetadata" or item is None:
            self._problems.append(f"{name!r} is described, but in no file")
            return UnknownObject("missing")
        self._value_bytes += item.length
        if self._value_bytes > _MAX_VALUE_BYTES:
            raise self._make_error(f"values other than tensors take more than {_MAX_VALUE_BYTES:,} bytes")
        contents = item.load()
        self._pickle_bytes += contents.source.pickle_size if isinstance(contents.source, ZipSource) else 0
        if self._pickle_bytes > MAX_NESTED_PICKLE_BYTES:
            raise self._make_error(
                f"the pickles of values other than tensors take more than {MAX_NESTED_PICKLE_BYTES:,} bytes"
            )
        self._globals.update(dict.fromkeys(contents.globals))
        self._problems.extend(f"{name}: {line}" for line in contents.problems)
        return prefix_storage_keys(contents.tree, name, contents.source)

    def _read_tensor(self, name: str, state: Any) -> Tensor:
        """Return a tensor with the range of its chunks."""
        dtype, shape, boxes = self._read_layout(name, state)
        chunks = []
        for offsets, sizes in boxes:
            item = self._items.get((name, offsets))
            fits = all(at + size <= length for at, size, length in zip(offsets, sizes, shape, strict=True))
            if item is None or not fits or math.prod(sizes) * ITEMSIZE[dtype] > item.length:
                self._problems.append(f"the part of {name!r} at {list(offsets)} is in no file, or of another size")
                continue
            chunks.append(Chunk(offsets, sizes, item))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            self._problems.append(f"the parts of {name!r} do not make up its shape {list(shape)}")
        byte_range = ShardedRange(name, dtype, shape, tuple(chunks))
        return Tensor(Storage(name, dtype, "cpu", byte_range.size, byte_range), dtype, shape, contiguous_strides(shape))

    def _read_layout(self, name: str, state: Any) -> tuple[str, tuple[int, ...], list[tuple[Any, Any]]]:
        try:
            dtype = _state_as_tuple(state["properties"])[0]
            shape = _sizes(state["size"])
            chunks = [_state(chunk) for chunk in state["chunks"]]
            boxes = [(_sizes(chunk["offsets"]), _sizes(chunk["sizes"])) for chunk in chunks]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._make_error(f"the description of {name!r} makes no sense") from error
        known = isinstance(dtype, Global) and dtype.name.removeprefix("torch.") in ITEMSIZE
        if not known or any({len(offsets), len(sizes)} != {len(shape)} for offsets, sizes in boxes):
            raise self._make_error(f"the description of {name!r} makes no sense")
        return dtype.name.removeprefix("torch."), shape, boxes

    def _make_error(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self._path}: {what}; the checkpoint is damaged, copy it again or use another one")


class _ItemsSource(RangeSource):
    """The source with the checksums of all the small checkpoints."""

    def __init__(self, files: OpenFiles, items: list[StorageMetadata]) -> None:
        super().__init__(files.directory)
        self._items = items
        self.checksummed_bytes = sum(item.length for item in items)

    def verify_checksums(self) -> Iterator[str]:
        """Yield one line for each part whose bytes differ from what was written."""
        for item in self._items:
            try:
                yield from (
                    f"{item.path.name} at {item.offset:,}: {line}" for line in item.load().source.verify_checksums()
                )
            except ArchiveError as error:
                yield str(error).removeprefix(f"{self.path}/")


def _state(node: Any) -> dict[Any, Any]:
    """Return the attributes of a described object, if it has any."""
    return _as_dict(node.state) if isinstance(node, UnknownObject) else {}


def _is_path(value: Any) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple) and 0 < len(value) < MAX_DEPTH and all(isinstance(key, str | int) for key in value)


def _as_dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _state_as_tuple(node: Any) -> tuple[Any, ...]:
    return tuple(node.state) if isinstance(node, UnknownObject) and isinstance(node.state, tuple) else ()


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_RANK or not all(map(is_size, value)):
        raise ValueError("invalid sizes")
    return value


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> bool:
    """Set a value at a path of keys and indices; return False if another value is in the way."""
    inner: Any = tree
    for key in path[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
    return isinstance(inner, dict) and inner.setdefault(path[-1], value) is value


def _restore_lists(node: Any) -> Any:
    """Convert dictionaries whose keys are indices to lists."""
    if not isinstance(node, dict) or not node:
        return node
    values = {key: _restore_lists(value) for key, value in node.items()}
    if all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values
