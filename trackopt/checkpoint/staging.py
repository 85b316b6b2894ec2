"""A checkpoint's file in memory: state is copied there in the loop, and from there written in the background.

The memory is reused by every save, since touching fresh pages takes ten times as long as the copy.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.zip_writer import (
    ZipEntry,
    central_directory,
    constant_records,
    directory_size,
    plan_entries,
    serialization_id,
)
from trackopt.checkpoint.pickler import pickled
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
_HEADROOM = 1 << 20  # bytes that a checkpoint may grow by before new memory is needed


class Staging:
    """The memory of one run's saves: one at a time is in it."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def prepare(self, size: int) -> None:
        """Get memory for a checkpoint of about ``size`` bytes, and touch it; other threads can run meanwhile."""
        memory = self._reserve(size)
        np.frombuffer(memory, np.uint8)[::PAGE] = 0

    def stage(self, tree: dict[str, Any]) -> Staged:
        """Copy a captured tree; when this returns, the live objects may change.

        The copy from a GPU is waited for.

        Raises:
            UsageError: Two tensors share their memory and are of different dtypes.
            CheckpointError: There is not enough memory.
        """
        pickle, storages = pickled(tree)
        found = plan_entries(len(pickle), [storage.nbytes() for storage in storages])
        size = found[-1].end + directory_size(found)
        memory = self._reserve(size)
        for place in found:
            memory[place.header : place.data] = place.local_header()
        small = [*found[:4], found[-2]]
        for place, content in zip(small, (pickle, *constant_records()), strict=True):
            memory[place.data : place.stop] = content
        for place, storage in zip(found[4:-2], storages, strict=True):
            _copy(storage, memory, place)
        return Staged(memory, found, size)

    def release(self) -> None:
        """Let go of the memory."""
        self._memory = None

    def _reserve(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < _round_to_page(size):
            length, self._memory = _round_to_page(size + size // 16 + _HEADROOM), None
            try:
                self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise CheckpointError(
                    f"a checkpoint cannot be copied ({error.strerror}: {length:,} bytes); free some memory"
                ) from error
            if hasattr(mmap, "MADV_DONTFORK"):  # not on macOS
                # A data worker's fork would make the next copy fault on every page, and direct writes unsafe.
                self._memory.madvise(mmap.MADV_DONTFORK)
        return self._memory


class Staged:
    """One checkpoint in staging memory, complete but for its checksums.

    Attributes:
        size: Bytes of the file.
        memory: They begin here; what follows up to the next page may be written with them.
    """

    def __init__(self, memory: mmap.mmap, found: list[ZipEntry], size: int) -> None:
        self.size = size
        self.memory = memoryview(memory)[: _round_to_page(size)]
        self._places = found

    def finalize_checksums(self) -> Iterator[int]:
        """Write the checksums, record by record; after each, up to where the file can be written."""
        crcs: list[int] = []
        for place in self._places[:-1]:
            crcs.append(crc32(self.memory[place.data : place.stop]))
            self.memory[place.stop : place.end] = place.data_descriptor(crcs[-1])
            yield place.end
        last = self._places[-1]
        identity = serialization_id(self._places, crcs)
        self.memory[last.data : last.stop] = identity
        crcs.append(crc32(identity))
        self.memory[last.stop : last.end] = last.data_descriptor(crcs[-1])
        self.memory[last.end : self.size] = central_directory(self._places, crcs)
        yield self.size


def _copy(storage: torch.UntypedStorage, memory: mmap.mmap, place: ZipEntry) -> None:
    if place.size:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        torch.frombuffer(memory, dtype=torch.uint8, count=place.size, offset=place.data).copy_(source)


def _round_to_page(size: int) -> int:
    return size + -size % PAGE
