"""Several files as one container: their sources together, their storages with the file in their keys."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.byte_ranges import BytesRange
from trackopt.archive.io.open_files import ADVICE
from trackopt.archive.io.source import RangeSource
from trackopt.archive.tree import Storage, UnknownObject
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.io.byte_ranges import ByteRange
    from trackopt.archive.io.source import TensorSource


@dataclass(frozen=True)
class StorageRange:
    """The bytes of a storage, read through its own container.

    Attributes:
        source: The container.
        storage: The storage under its key in the container.
        key: A name that no other storage in the directory has.
    """

    source: TensorSource
    storage: Storage
    key: str

    @property
    def size(self) -> int:
        """The number of bytes; raises ArchiveError if the record is missing."""
        byte_range = self.storage.byte_range
        return self.source.size(self.storage) if byte_range is None else byte_range.size

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``."""
        byte_range = self.storage.byte_range
        return self.source.read(self.storage, start, stop) if byte_range is None else byte_range.read(start, stop)

    def slice(self, start: int, stop: int) -> ByteRange:
        """Return a copy of a part of this range."""
        return BytesRange(self.read(start, min(stop, self.size)), start)


class MultiFileSource(RangeSource):
    """The sources of several files, with the checksums of all of them."""

    def __init__(self, path: Path, members: dict[str, TensorSource]) -> None:
        orders = {source.byteorder for source in members.values()}
        if len(orders) > 1:
            raise ArchiveError(f"{path}: its files differ in their byte order; {ADVICE}")
        super().__init__(path, next(iter(orders), "little"))
        self._members = members
        self.checksummed_bytes = sum(source.checksummed_bytes for source in members.values())

    def verify_checksums(self) -> Iterator[str]:
        """Yield one line for each part of a file whose bytes differ from what was written."""
        for name, source in self._members.items():
            yield from (f"{name}: {line}" for line in source.verify_checksums())


def prefix_storage_keys(node: Any, name: str, source: TensorSource) -> Any:
    """Return a file's tree, with the file's name in the storages' keys and its source as their range."""
    return _KeyPrefixer(name, source).visit(node)


class _KeyPrefixer:
    """Replace the storages of a tree; nodes that occur several times stay shared. No tree is nested deeply."""

    def __init__(self, name: str, source: TensorSource) -> None:
        self._name = name
        self._source = source
        self._visited: dict[int, Any] = {}

    def visit(self, node: Any) -> Any:
        if not isinstance(node, dict | list | tuple | UnknownObject) and not is_dataclass(node):
            return node
        if id(node) not in self._visited:
            self._visited[id(node)] = self._replace(node)
        return self._visited[id(node)]

    def _replace(self, node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(map(self.visit, node))
        if isinstance(node, dict | list):
            for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
                node[key] = self.visit(value)
        elif isinstance(node, UnknownObject):
            for component, value in node.components():
                setattr(node, component, self.visit(value))
        elif isinstance(node, Storage):
            key = f"{self._name}/{node.key}"
            return replace(node, key=key, byte_range=StorageRange(self._source, node, key))
        elif is_dataclass(node) and not isinstance(node, type):
            return replace(node, **{field.name: self.visit(getattr(node, field.name)) for field in fields(node)})
        return node
