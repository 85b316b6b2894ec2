"""A checkpoint's file in memory: the loop copies state there, and a background thread writes it.

Every save uses the same memory again, since touching fresh pages takes ten times as long as the copy.
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

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
from trackopt.checkpoint.parts import expand
from trackopt.checkpoint.pickler import dump_checkpoint
from trackopt.checkpoint.save_plan import Planner, UnplannedTree
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.checkpoint.save_plan import SavePlan
    from trackopt.utils.types import CheckpointTree

PAGE_BYTES = mmap.PAGESIZE
_HEADROOM_BYTES = 1 << 20  # a checkpoint may grow by so much before new memory is needed


class Staging:
    """The memory of one run's saves; it holds one checkpoint at a time."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._planner = Planner()

    def prepare(self, size: int) -> None:
        """Allocate and touch memory for a checkpoint of about ``size`` bytes; other threads can run meanwhile."""
        before = self._memory
        memory = self._reserve(size)
        if memory is not before:  # or it may hold a checkpoint that is being written
            np.frombuffer(memory, np.uint8)[::PAGE_BYTES] = 0

    def stage(self, tree: CheckpointTree) -> Staged:
        """Copy a captured tree, also from GPUs; when this returns, the live objects may change.

        A tree with parts is pickled and laid out by a plan, if there is one for it.

        Raises:
            UsageError: The tree cannot be pickled, or not so that it can be loaded safely.
            CheckpointError: There is not enough memory.
        """
        plan = self._planner.find(tree)
        if plan is not None:
            try:
                return self._stage_by_plan(tree, plan)
            except UnplannedTree:
                self._planner.release()
        pickled = dump_checkpoint(expand(tree))
        entries = plan_entries(len(pickled.data), [storage.nbytes() for storage in pickled.storages])
        size = entries[-1].end + directory_size(entries)
        memory = self._reserve(size)
        for entry in entries:
            memory[entry.header : entry.data] = entry.local_header()
        small = [*entries[:4], entries[-2]]
        for entry, content in zip(small, (pickled.data, *constant_records()), strict=True):
            memory[entry.data : entry.stop] = content
        for entry, storage in zip(entries[4:-2], pickled.storages, strict=True):
            _copy(storage, memory, entry)
        return Staged(memory, entries, size, pickled.globals)

    def _stage_by_plan(self, tree: CheckpointTree, plan: SavePlan) -> Staged:
        pickled, entries, size = plan.dump(tree)
        memory = self._reserve(size)
        planned = plan.copy(memory)
        for entry in [*entries[:2], *entries[4 + planned :]]:
            memory[entry.header : entry.data] = entry.local_header()
        records = constant_records()
        small = [*entries[:2], entries[-2]]
        for entry, content in zip(small, (pickled.data, records[0], records[-1]), strict=True):
            memory[entry.data : entry.stop] = content
        for entry, storage in zip(entries[4 + planned : -2], pickled.storages[planned:], strict=True):
            _copy(storage, memory, entry)
        return Staged(memory, entries, size, pickled.globals)

    def release(self) -> None:
        """Release the memory."""
        self._memory = None
        self._planner.release()

    def _reserve(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < _round_to_page(size):
            length, self._memory = _round_to_page(size + size // 16 + _HEADROOM_BYTES), None
            try:
                self._memory = _allocate(length)
            except OSError as error:
                raise CheckpointError(
                    f"a checkpoint cannot be copied ({error.strerror}: {length:,} bytes); free some memory"
                ) from error
        return self._memory


class Staged:
    """One checkpoint in staging memory, complete but for its checksums.

    Attributes:
        size: Bytes of the file.
        memory: The file, and the rest of its last page, which may be written with it.
        globals: Every name of a class, function or dtype in its pickle.
    """

    def __init__(self, memory: mmap.mmap, entries: list[ZipEntry], size: int, names: frozenset[str]) -> None:
        self.size = size
        self.globals = names
        self.memory = memoryview(memory)[: _round_to_page(size)]
        self._entries = entries

    @property
    def pickle(self) -> memoryview:
        """The bytes of its pickle."""
        return self.memory[self._entries[0].data : self._entries[0].stop]

    def read_storage(self, key: str, size: int) -> torch.UntypedStorage:
        """Return a storage that shares the staging memory."""
        entry = self._entries[4 + int(key)]
        if not size:  # frombuffer refuses it
            return torch.empty(0, dtype=torch.uint8, device="cpu").untyped_storage()
        tensor = torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=entry.data)
        return tensor.untyped_storage()

    def finalize_checksums(self) -> Iterator[int]:
        """Compute the checksums record by record; yield after each how many bytes of the file are final."""
        crcs: list[int] = []
        for entry in self._entries[:-1]:
            crcs.append(crc32(self.memory[entry.data : entry.stop]))
            self.memory[entry.stop : entry.end] = entry.data_descriptor(crcs[-1])
            yield entry.end
        last = self._entries[-1]
        identity = serialization_id(self._entries, crcs)
        self.memory[last.data : last.stop] = identity
        crcs.append(crc32(identity))
        self.memory[last.stop : last.end] = last.data_descriptor(crcs[-1])
        self.memory[last.end : self.size] = central_directory(self._entries, crcs)
        yield self.size


def _allocate(length: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, length)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        # A data worker's fork would make the next copy fault on every page, and direct writes unsafe.
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


def _copy(storage: torch.UntypedStorage, memory: mmap.mmap, entry: ZipEntry) -> None:
    if entry.size:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        torch.frombuffer(memory, dtype=torch.uint8, count=entry.size, offset=entry.data).copy_(source)


def _round_to_page(size: int) -> int:
    return size + -size % PAGE_BYTES
