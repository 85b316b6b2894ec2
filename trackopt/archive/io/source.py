"""The sources of tensor bytes: the interface that every format offers to its readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trackopt.archive.tree import ITEMSIZE
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.io.open_files import OpenFiles
    from trackopt.archive.tree import Storage, Tensor


class TensorSource(Protocol):
    """The storages of one container.

    Attributes:
        path: The file, for messages.
        byteorder: ``"little"`` or ``"big"``.
        checksummed_bytes: Bytes in the file that its checksums cover.
    """

    path: Path
    byteorder: str
    checksummed_bytes: int

    def size(self, storage: Storage) -> int:
        """Return a storage's size in bytes; raises ArchiveError if it is missing."""

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``; raises ArchiveError if they are missing."""

    def verify_checksums(self) -> Iterator[str]:
        """Yield one line for each part whose bytes differ from what was written."""


class RangeSource:
    """The source of a format whose storages have byte ranges of their own; it has no checksums.

    Args:
        path: The file, for messages.
        byteorder: ``"little"`` or ``"big"``.
    """

    checksummed_bytes = 0

    def __init__(self, path: Path, byteorder: str = "little") -> None:
        self.path = path
        self.byteorder = byteorder

    def size(self, storage: Storage) -> int:
        """Raise ArchiveError: the storage has no byte range."""
        raise self._missing(storage)

    def read(self, storage: Storage, start: int, stop: int) -> bytes:  # noqa: ARG002 - a `TensorSource` has these
        """Raise ArchiveError: the storage has no byte range."""
        raise self._missing(storage)

    def verify_checksums(self) -> Iterator[str]:
        """Yield nothing: there are no checksums to compare with."""
        return iter(())

    def _missing(self, storage: Storage) -> ArchiveError:
        return ArchiveError(f"{self.path}: the data of storage {storage.key!r} is missing; use another checkpoint")


@dataclass(frozen=True)
class Contents:
    """The structure of a checkpoint, as the loader of its format returns it.

    Attributes:
        format: The format's name.
        tree: The plain values and nodes.
        source: Where tensor bytes come from.
        globals: Every class or function name in the file.
        problems: What is wrong or ambiguous, one line each.
        files: Open files other than the one that was passed in, to be closed with it.
    """

    format: str
    tree: Any
    source: TensorSource
    globals: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    files: OpenFiles | None = None


def read_storage(source: TensorSource, storage: Storage, start: int, stop: int) -> bytes:
    """Read the bytes ``start`` to ``stop`` of a storage, from its byte range or from the source."""
    data = storage.byte_range.read(start, stop) if storage.byte_range is not None else source.read(storage, start, stop)
    if storage.byteorder in (None, source.byteorder):
        return data
    return _byteswap(data, storage.dtype)


def _byteswap(data: bytes, dtype: str) -> bytes:
    """Convert numbers to the other byte order."""
    size = ITEMSIZE[dtype] // (2 if dtype.startswith("complex") else 1)
    swapped = bytearray(len(data))
    for position in range(size):
        swapped[position::size] = data[size - 1 - position :: size]
    return bytes(swapped)


def out_of_bounds_reason(tensor: Tensor, source: TensorSource) -> str | None:
    """Return why a tensor cannot be read from its storage, or None if it can."""
    if tensor.is_meta:
        return None  # it never had values
    storage = tensor.storage
    try:
        size = storage.byte_range.size if storage.byte_range is not None else source.size(storage)
    except ArchiveError as error:
        return str(error)
    if size != storage.nbytes:
        return f"storage {storage.key!r} needs {storage.nbytes:,} bytes, its record has {size:,}"
    end = (tensor.offset + tensor.extent) * tensor.itemsize if tensor.elements else 0
    if end > size:
        return f"a tensor reaches to byte {end:,} of storage {storage.key!r}, which has {size:,}"
    return None
