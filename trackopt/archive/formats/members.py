"""Several files as one container: opened within their directory, their tensors told apart by the file."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.byte_ranges import BytesRegion, RangeSource
from trackopt.archive.tree import Storage, UnknownObject
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trackopt.archive.io.byte_ranges import ByteRange
    from trackopt.archive.io.source import Contents, TensorSource

    Load = Callable[[Path, int], Contents]

_MAX_TEXT = 64 << 20
_ADVICE = "copy the whole directory again or use another checkpoint"


@dataclass
class OpenFiles:
    """The files of a directory that are open, until whoever asked for them closes them.

    Attributes:
        directory: Nothing outside of it is opened.
        descriptors: By path.
    """

    directory: Path
    descriptors: dict[Path, int] = field(default_factory=dict)

    def open(self, name: Any) -> tuple[Path, int]:
        """A file of the directory, by the name that something in it gives.

        Raises:
            ArchiveError: It is missing, no plain file, or outside of the directory.
        """
        path = resolve_inside(self.directory, name)
        if path not in self.descriptors:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
            except FileNotFoundError as error:
                raise ArchiveError(f"{self.directory}: its file {name!r} is missing; {_ADVICE}") from error
            except OSError as error:
                raise ArchiveError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
            self.descriptors[path] = file
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ArchiveError(f"{path}: it is no plain file; {_ADVICE}")
        return path, self.descriptors[path]

    def text(self, name: str) -> bytes:
        """All of a small file."""
        path, file = self.open(name)
        size = os.fstat(file).st_size
        if size > _MAX_TEXT:
            raise ArchiveError(f"{path}: it has {size:,} bytes, at most {_MAX_TEXT:,} are read; {_ADVICE}")
        return os.pread(file, size, 0)

    @property
    def bytes(self) -> int:
        """Size of all the files."""
        return sum(os.fstat(file).st_size for file in self.descriptors.values())

    def close(self) -> None:
        """Close the files."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def resolve_inside(directory: Path, name: Any) -> Path:
    """The path of a file in a directory; links may not lead out of it.

    The hub's cache alone is made of links: a snapshot's files point to ``blobs`` beside ``snapshots``.

    Raises:
        ArchiveError: The name leads elsewhere.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ArchiveError(f"{directory}: it names a file {name!r:.80}, which is no file name; {_ADVICE}")
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    path = directory / name
    try:
        outside = Path(name).is_absolute() or ".." in Path(name).parts
        real = path.resolve(strict=False)
    except (OSError, RuntimeError) as error:  # a loop of links, or a name that is too long
        raise ArchiveError(f"{directory}: its file {name!r:.80} cannot be found ({error}); {_ADVICE}") from error
    if outside or not any(real.is_relative_to(place) for place in allowed):
        raise ArchiveError(f"{directory}: it names {name!r:.80}, a file outside of it, which is not opened; {_ADVICE}")
    return path


@dataclass(frozen=True)
class StorageRegion:
    """The bytes of a storage as its own container gives them.

    Attributes:
        source: The container.
        storage: Under its key in there.
        key: A name that no other storage in the directory has.
    """

    source: TensorSource
    storage: Storage
    key: str

    @property
    def size(self) -> int:
        """How many there are; raises ArchiveError if the record is missing."""
        region = self.storage.region
        return self.source.size(self.storage) if region is None else region.size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``."""
        region = self.storage.region
        return self.source.read(self.storage, start, stop) if region is None else region.read(start, stop)

    def slice(self, start: int, stop: int) -> ByteRange:
        """A copy of a stretch of this one."""
        return BytesRegion(self.read(start, min(stop, self.size)), start)


class MultiFileSource(RangeSource):
    """The checksums of all the members together."""

    def __init__(self, path: Path, members: dict[str, TensorSource]) -> None:
        orders = {source.byteorder for source in members.values()}
        if len(orders) > 1:
            raise ArchiveError(f"{path}: its files differ in their byte order; {_ADVICE}")
        super().__init__(path, next(iter(orders), "little"))
        self._members = members
        self.checksummed_bytes = sum(source.checksummed_bytes for source in members.values())

    def verify_checksums(self) -> Iterator[str]:
        """One line for each part of a member whose bytes are not those that were written."""
        for name, source in self._members.items():
            yield from (f"{name}: {line}" for line in source.verify_checksums())


def prefix_storage_keys(node: Any, name: str, source: TensorSource) -> Any:
    """A member's tree, with storages that know which file they are in."""
    return _KeyPrefixer(name, source).visit(node)


class _KeyPrefixer:
    """Replaces storages. Containers that stand in several places stay one; none is nested deeply."""

    def __init__(self, name: str, source: TensorSource) -> None:
        self._name = name
        self._source = source
        self._done: dict[int, Any] = {}

    def visit(self, node: Any) -> Any:
        if not isinstance(node, dict | list | tuple | UnknownObject) and not is_dataclass(node):
            return node
        if id(node) not in self._done:
            self._done[id(node)] = self._change(node)
        return self._done[id(node)]

    def _change(self, node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(map(self.visit, node))
        if isinstance(node, dict | list):
            for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
                node[key] = self.visit(value)
        elif isinstance(node, UnknownObject):
            for part, value in node.components():
                setattr(node, part, self.visit(value))
        elif isinstance(node, Storage):
            key = f"{self._name}/{node.key}"
            return replace(node, key=key, region=StorageRegion(self._source, node, key))
        elif is_dataclass(node) and not isinstance(node, type):
            return replace(node, **{one.name: self.visit(getattr(node, one.name)) for one in fields(node)})
        return node
