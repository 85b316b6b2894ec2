"""The plan of a checkpoint's file: what is the same at the next save is laid out and pickled once.

A plan fits a state only if nothing but the contents of its tensors has changed: the keys in their order, and the class,
dtype, device, shape, strides, bits, attributes and address of every tensor. Whatever else changes makes a new plan.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trackopt.archive.io.zip_writer import ZipEntry, constant_records, directory_size, place_entries, plan_entries
from trackopt.archive.unpickler.weights_only import is_allowed
from trackopt.checkpoint.host_memory import view_memory
from trackopt.checkpoint.parts import ConstantPart, ModulePart, TensorPart, expand, find_parts
from trackopt.checkpoint.pickler import PartsOutgrown, PickledParts, PickledTree, dump_checkpoint, dump_tree
from trackopt.checkpoint.tensor_check import TensorCheck

if TYPE_CHECKING:
    import mmap

    from numpy.typing import NDArray

    from trackopt.checkpoint.parts import Part
    from trackopt.utils.types import CheckpointTree

    _Bytes = NDArray[np.uint8]

_SMALL_BYTES = 64 << 10  # of a storage that NumPy copies faster than torch, together with others and their headers
_MIN_TENSORS = 32  # for which a plan is worth its room in the file
_MIN_MEMO = 4096
_MIN_ROOM, _MAX_ROOM = 4096, 32_000  # by which a pickle may grow
_MAX_PADDING = 65_000  # of a header, whose length is a number of 16 bits


class SavePlan:
    """The plan for the saves of one structure.

    Args:
        parts: The parts of a tree.
        rest: Bytes that the pickle of the rest of the tree has, about.

    Raises:
        UnplannedTree: No plan can be made for it.
    """

    def __init__(self, parts: list[Part], rest: int) -> None:
        self._layouts = copy.deepcopy([(type(part), part.layout) for part in parts])
        tensors = _tensors(parts)
        self._check = TensorCheck(tensors)
        if not self._check.is_possible or any(tensor.device.type != "cpu" for tensor in tensors):
            raise UnplannedTree
        self._pointers = list(map(Tensor.data_ptr, self._check.unique))
        values = [part.value for part in parts]
        if not self.fits(parts) or not all(map(_is_complete, parts, values)):
            raise UnplannedTree
        self._pickled = PickledParts(values, _MIN_MEMO + rest)
        if not all(map(is_allowed, self._pickled.pickler.globals)):
            raise UnplannedTree
        self._storages = list(self._pickled.pickler.storages)
        pickle_size = rest + sum(map(len, self._pickled.pickles))
        self._room = pickle_size + min(_MIN_ROOM + pickle_size // 16, _MAX_ROOM)
        self._entries = plan_entries(self._room, [storage.nbytes() for storage in self._storages])[:-2]
        self._directory_size = directory_size(self._entries)
        self._copies: _Copies | None = None

    def fits(self, parts: list[Part]) -> bool:
        """Return whether only the contents of the tensors in the parts can have changed."""
        if self._layouts != [(type(part), part.layout) for part in parts]:
            return False
        tensors = _tensors(parts)
        attributes = map(vars, chain.from_iterable(part.tensors for part in parts if isinstance(part, TensorPart)))
        return (
            self._check.is_same(tensors)
            and list(map(Tensor.data_ptr, self._check.unique)) == self._pointers
            and not any(attributes)  # which are pickled with a tensor, but not with a module's
        )

    def dump(self, tree: CheckpointTree) -> tuple[PickledTree, list[ZipEntry], int]:
        """Pickle a tree; return also its records and the size of its file.

        Raises:
            UsageError: As `dump_checkpoint`.
            UnplannedTree: What is not in the parts has outgrown the plan.
        """
        try:
            pickled = dump_checkpoint(tree, self._pickled)
        except PartsOutgrown as error:
            raise UnplannedTree from error
        if not self._room - _MAX_PADDING <= len(pickled.data) <= self._room:
            raise UnplannedTree
        first = replace(self._entries[0], size=len(pickled.data))
        second = replace(self._entries[1], header=first.end)  # its padding takes what the pickle leaves
        new = pickled.storages[len(self._storages) :]
        sizes = [(f"data/{key}", storage.nbytes()) for key, storage in enumerate(new, len(self._storages))]
        sizes += [("version", len(constant_records()[-1])), (".data/serialization_id", 40)]
        others = place_entries(sizes, self._entries[-1].end)
        size = others[-1].end + self._directory_size + directory_size(others) - directory_size(())
        return pickled, [first, second, *self._entries[2:], *others], size

    def copy(self, memory: mmap.mmap) -> int:
        """Copy the storages of the parts, with all headers between them; return how many storages that are."""
        if self._copies is None or self._copies.memory is not memory:
            self._copies = _Copies(memory, self._entries, self._storages)
        self._copies.run()
        return len(self._storages)


class UnplannedTree(Exception):
    """A tree for which there is no plan: it is saved as a whole."""


class Planner:
    """Keeps the plan of one run's saves, and makes a new one when the structure has changed."""

    def __init__(self) -> None:
        self._plan: SavePlan | None = None
        self._rest = 0
        self._pause = 0  # saves until the next plan, if the last ones were of no use
        self._longest_pause = 0

    def find(self, tree: CheckpointTree) -> SavePlan | None:
        """Return the plan for a tree with parts; ``None`` if it is to be saved as a whole."""
        parts = list(find_parts(tree))
        if self._plan is not None and self._plan.fits(parts):
            self._longest_pause = 0
            return self._plan
        if self._plan is not None:
            self._plan, self._pause = None, self._longest_pause
            self._longest_pause = min(2 * self._longest_pause + 1, 15)
        if self._pause or len(_tensors(parts)) < _MIN_TENSORS:
            self._pause = max(self._pause - 1, 0)
            return None
        with contextlib.suppress(UnplannedTree):
            self._plan = SavePlan(parts, len(dump_tree(expand(tree, lambda _: None)).data))
        return self._plan

    def release(self) -> None:
        """Forget the plan."""
        self._plan = None


class _Copies:
    """The copies into the staging memory: NumPy joins small storages and headers, torch copies large storages."""

    def __init__(self, memory: mmap.mmap, entries: list[ZipEntry], storages: list[torch.UntypedStorage]) -> None:
        self.memory = memory
        self._joins: list[tuple[list[_Bytes], _Bytes]] = []
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        start, pieces, header = entries[2].header, [], b""
        contents: list[bytes | torch.UntypedStorage] = [*constant_records()[1:3], *storages]
        for entry, content in zip(entries[2:], contents, strict=True):
            header += entry.local_header()
            if isinstance(content, bytes):
                header += content
            elif 0 < entry.size <= _SMALL_BYTES:
                pieces += [
                    np.frombuffer(header, np.uint8),
                    np.frombuffer(view_memory(content.data_ptr(), content.nbytes()), np.uint8),
                ]
                header = b""
            elif entry.size:
                self._join(start, [*pieces, np.frombuffer(header, np.uint8)])
                self._sources.append(_bytes_of(content))
                self._targets.append(torch.frombuffer(memory, dtype=torch.uint8, count=entry.size, offset=entry.data))
                start, pieces, header = entry.stop, [], b""
            header += bytes(entry.end - entry.stop)  # the checksum follows when the file is written
        self._join(start, [*pieces, np.frombuffer(header, np.uint8)])

    def run(self) -> None:
        """Copy everything."""
        for pieces, target in self._joins:
            np.concatenate(pieces, out=target)
        if self._sources:
            torch._foreach_copy_(self._targets, self._sources)

    def _join(self, start: int, pieces: list[_Bytes]) -> None:
        size = sum(map(len, pieces))
        self._joins.append((pieces, np.frombuffer(self.memory, np.uint8, size, start)))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(parts: list[Part]) -> list[Tensor]:
    return list(chain.from_iterable(part.tensors for part in parts if not isinstance(part, ConstantPart)))


def _is_complete(part: Part, state: Any) -> bool:
    """Return whether the state dict of a module is what was found in it, so that changes in it will be seen."""
    if not isinstance(part, ModulePart):
        return True
    versions = {name: own.get("version") for name, own in state._metadata.items()}
    return (
        (list(state), versions) == part.layout
        and all(own.keys() == {"version"} for own in state._metadata.values())
        and list(map(Tensor.data_ptr, state.values())) == list(map(Tensor.data_ptr, part.tensors))
        and not any(map(vars, state.values()))
    )
