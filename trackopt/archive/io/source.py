"""What every container offers to whoever reads tensors from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trackopt.archive.tree import ITEMSIZE
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.formats.members import OpenFiles
    from trackopt.archive.tree import Storage, Tensor


class TensorSource(Protocol):
    """A container's storages.

    Attributes:
        path: The file, for messages.
        byteorder: ``"little"`` or ``"big"``.
        checksummed_bytes: Bytes that its checksums cover, in the file.
    """

    path: Path
    byteorder: str
    checksummed_bytes: int

    def size(self, storage: Storage) -> int:
        """How many bytes are there; raises ArchiveError if the storage is missing."""

    def read(self, storage: Storage, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``; raises ArchiveError if they are not there."""

    def verify_checksums(self) -> Iterator[str]:
        """One line for each part whose bytes are not those that were written."""


@dataclass(frozen=True)
class Contents:
    """What a container holds, as its loader hands it over.

    Attributes:
        format: What it is, in words.
        tree: The plain values and nodes.
        source: Where tensor bytes come from.
        globals: Every name the file refers to.
        problems: What is wrong or ambiguous, one line each.
        files: Files beside the one that was opened, to be closed with it.
    """

    format: str
    tree: Any
    source: TensorSource
    globals: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    files: OpenFiles | None = None


def read_storage(source: TensorSource, storage: Storage, start: int, stop: int) -> bytes:
    """The bytes ``start`` to ``stop`` of a storage, wherever they are."""
    place = storage.region
    data = source.read(storage, start, stop) if place is None else place.read(start, stop)
    if storage.byteorder in (None, source.byteorder):
        return data
    return _byteswap(data, storage.dtype)


def _byteswap(data: bytes, dtype: str) -> bytes:
    """Numbers in the other byte order."""
    size = ITEMSIZE[dtype] // (2 if dtype.startswith("complex") else 1)
    swapped = bytearray(len(data))
    for position in range(size):
        swapped[position::size] = data[size - 1 - position :: size]
    return bytes(swapped)


def out_of_bounds_reason(tensor: Tensor, source: TensorSource) -> str | None:
    """Why a tensor cannot be read from its storage, or None if it can."""
    if tensor.meta:
        return None  # it never had values
    try:
        size = tensor.storage.region.size if tensor.storage.region is not None else source.size(tensor.storage)
    except ArchiveError as error:
        return str(error)
    if size != tensor.storage.nbytes:
        return f"storage {tensor.storage.key!r} needs {tensor.storage.nbytes:,} bytes, its record has {size:,}"
    end = (tensor.offset + tensor.extent) * tensor.itemsize if tensor.elements else 0
    if end > size:
        return f"a tensor reaches to byte {end:,} of storage {tensor.storage.key!r}, which has {size:,}"
    return None
