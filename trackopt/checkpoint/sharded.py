"""The checkpoint of a sharded training: a directory into which all processes write.

::

    step-00000100/
      __0_0.distcp …   each process's part of models and optimizers, by torch.distributed.checkpoint (DCP)
      .metadata        DCP's index; any number of processes can read it
      training.pt      everything else: schedulers, random generators, positions, the run's own entry
      manifest.json    the checksum of each file

It is written under a temporary name, the manifest last, and renamed when all processes are done.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from trackopt import archive, locations
from trackopt.archive.formats import manifest
from trackopt.archive.formats.directories import UNSHARDED_FILE
from trackopt.archive.tree import UnknownObject
from trackopt.checkpoint.resharding import LazyTensor, decode_key
from trackopt.checkpoint.writer import PARTIAL_SUFFIX, write
from trackopt.errors import ArchiveError, CheckpointError, RunError
from trackopt.training.sharding import contains_dtensor, is_dtensor, to_local
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged
    from trackopt.distributed.collectives import Collectives
    from trackopt.utils.types import CheckpointTree

_BACKUP_SUFFIX = ".before"
_SHARDED_KEYS = ("model", "optimizer")

T = TypeVar("T")


class ProcessGroupLost(CheckpointError):
    """A checkpoint was not written since the processes no longer reach each other.

    Attributes:
        path: The checkpoint.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: not written ({reason})")
        self.path = path


@dataclass(frozen=True)
class ShardedCheckpoint:
    """This process's part of one staged checkpoint.

    Attributes:
        parts: The local parts of the sharded state.
        rest: Everything else; only rank 0 has it.
        error: The error that left this process without a part; the others learn of it when they write.
    """

    parts: CheckpointTree
    rest: Staged | None
    error: Exception | None = None


class CpuStateDict:
    """Copies of live tensors, in memory that every save uses again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        """Return a state with copies of its tensors on the CPU, complete when this returns."""
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), path)
        if isinstance(value, dict):
            return {key: self.copy(child, (*path, key)) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy(child, (*path, index)) for index, child in enumerate(value))
        return value

    def clear(self) -> None:
        """Release the memory."""
        self._buffers.clear()

    def _copy_tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
        part = to_local(tensor)
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (part.shape, part.dtype):
            buffer = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=part.is_cuda)
            self._buffers[path] = buffer
        buffer.copy_(part)
        if not is_dtensor(tensor):
            return buffer
        from torch.distributed.tensor import DTensor

        # from_local would take it back to the device
        return DTensor(buffer, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def split_sharded(tree: CheckpointTree) -> tuple[CheckpointTree, CheckpointTree]:
    """Split a captured tree into the keys with sharded state and the rest."""
    parts = {key: value for key, value in tree.items() if key in _SHARDED_KEYS or contains_dtensor(value)}
    return parts, {key: value for key, value in tree.items() if key not in parts}


def write_collectively(
    checkpoint: ShardedCheckpoint, path: Path, collectives: Collectives, *, before_commit: Callable[[], None]
) -> None:
    """Write a checkpoint as a directory and commit it; all processes call this, and return when it is committed.

    Args:
        checkpoint: This process's part.
        path: The directory's final name; it appears when everything is on the disk.
        collectives: The processes; nothing else may use their group meanwhile.
        before_commit: Called on rank 0 right before the rename.

    Raises:
        CheckpointError: On all processes, if one could not write; the name and all earlier checkpoints are unchanged.
        ProcessGroupLost: The processes could not tell each other that they have written.
    """
    part = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    rank = collectives.rank

    def begin() -> None:
        importlib.import_module("torch.distributed.checkpoint.state_dict_saver")  # before the ranks meet: it takes long

        if checkpoint.error is not None:
            raise checkpoint.error
        if collectives.is_rank_zero:
            _create_directory(part)

    def checksums() -> dict[str, Any]:
        return {file.name: manifest.checksum(file) for file in sorted(part.glob(f"__{rank}_*"))}

    def commit() -> None:
        if checkpoint.rest is None:  # on all ranks but rank 0
            return
        write(checkpoint.rest, part / UNSHARDED_FILE, before_commit=lambda: None)
        listed = {name: checksum for own in rank_checksums for name, checksum in own.items()}
        if missing := missing_shards(metadata, listed):
            raise CheckpointError(f"no process has written {missing[0]}")
        listed |= {name: manifest.checksum(part / name) for name in (".metadata", UNSHARDED_FILE)}
        _write_synced(part / manifest.NAME, manifest.encode(listed))
        before_commit()
        commit_directory(part, path)

    try:
        _gather_results(collectives, path, begin)
        metadata = _write_parts_collectively(checkpoint.parts, part, path, collectives)
        rank_checksums = _gather_results(collectives, path, checksums)
        _gather_results(collectives, path, commit)
    except CheckpointError:
        if collectives.is_rank_zero:
            shutil.rmtree(part, ignore_errors=True)
        raise


def commit_directory(part: Path, path: Path) -> None:
    """Rename a directory; one of the same name is kept as a backup for that moment (`recover_interrupted_commit`)."""
    backup = path.with_name(f".{path.name}{_BACKUP_SUFFIX}")
    if path.exists():
        shutil.rmtree(backup, ignore_errors=True)  # of a writer that was killed right after its rename
        path.rename(backup)
    part.rename(path)
    fsync_directory(path.parent)
    shutil.rmtree(backup, ignore_errors=True)


def recover_interrupted_commit(folder: Path) -> None:
    """Rename the backups of killed writers to their original names, or delete them if the commit was complete."""
    for backup in folder.glob(f".*{_BACKUP_SUFFIX}"):
        path = backup.with_name(backup.name[1 : -len(_BACKUP_SUFFIX)])
        if path.exists():
            shutil.rmtree(backup, ignore_errors=True)
        else:
            backup.rename(path)


def load(path: Path) -> CheckpointTree:
    """Return the tree of a checkpoint, with a `LazyTensor` for each sharded tensor.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        opened = locations.open(path)
        rest = torch.load(path / UNSHARDED_FILE, map_location="cpu", weights_only=True)
        return {key: _make_lazy(opened, node) for key, node in opened.tree.items() if key not in rest} | dict(rest)
    except (ArchiveError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({_reason(error)})") from error


def _make_lazy(opened: archive.Archive, node: Any) -> Any:
    if isinstance(node, archive.Tensor):
        tensor = LazyTensor(opened, node)
        return tensor if tensor.shape else tensor.read()  # a single number is never sharded
    if isinstance(node, dict):
        return {decode_key(key): _make_lazy(opened, child) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_make_lazy(opened, child) for child in node)
    if isinstance(node, UnknownObject) and node.name == "builtins.set":
        return set(node.items)
    if isinstance(node, UnknownObject):
        raise ArchiveError(f"contains {node!r}, which cannot be loaded without executing code")
    return node


def _create_directory(part: Path) -> None:
    part.parent.mkdir(exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    fsync_directory(part.parent)


def _write_parts_collectively(parts: CheckpointTree, part: Path, path: Path, collectives: Collectives) -> Any:
    """Write the sharded state with DCP, and return its index; an error of one process is raised on all."""
    written: list[Any] = []  # the index is large, and only rank 0 needs it
    _gather_results(collectives, path, lambda: written.append(_write_parts(parts, part, collectives)))
    return written[0]


def _write_parts(parts: CheckpointTree, part: Path, collectives: Collectives) -> Any:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if collectives.world_size > 1 and not torch.distributed.is_initialized():
        return None  # DCP would write this process's part as a whole checkpoint; the next exchange reports it
    try:
        return save(parts, storage_writer=FileSystemWriter(part), process_group=collectives.group)
    except CheckpointException as error:  # a BaseException; each process gets the failures of all
        if collectives.rank in error.failures:
            raise error.failures[collectives.rank][0] from None
        return None


def missing_shards(metadata: Any, listed: Collection[str]) -> list[str]:
    """Return what the index describes and no listed file holds.

    DCP takes a process whose group was destroyed for the only one, and its index for a complete one.
    """
    found = {
        (index.fqn, tuple(index.offset or ()))
        for index, info in metadata.storage_data.items()
        if info.relative_path in listed
    }
    missing = []
    for name, described in metadata.state_dict_metadata.items():
        chunks = getattr(described, "chunks", None)
        if chunks is None:
            missing += [] if (name, ()) in found else [repr(name)]
            continue
        offsets = [tuple(chunk.offsets) for chunk in chunks]
        missing += [f"the part of {name!r} at {list(each)}" for each in offsets if (name, each) not in found]
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(described.size):
            missing.append(f"all parts of {name!r}")
    return missing


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_directory(file.parent)


def _gather_results(collectives: Collectives, path: Path, action: Callable[[], T]) -> list[T]:
    """Run an action in each process, and return the results of all.

    Unlike ``Collectives.run_on_all`` it takes any exception for a failed checkpoint, after which training continues.

    Raises:
        CheckpointError: The action failed in one of the processes.
        ProcessGroupLost: The result of one of them did not arrive.
    """
    result, problem, advice = None, "", ""
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome
        problem = _reason(error)
        advice = "; check free space and the disk" if isinstance(_cause(error), OSError) else ""
    try:
        with collectives.during(f"the checkpoint {path.name}"):
            outcomes = collectives.gather_or_raise((problem, advice, result))
    except RunError as error:
        raise ProcessGroupLost(path, str(error)) from error
    for rank, (rank_problem, rank_advice, _) in enumerate(outcomes):
        if rank_problem:
            where = f"rank {rank}: " if len(outcomes) > 1 else ""
            raise CheckpointError(f"{path}: not written ({where}{rank_problem}){rank_advice}")
    return [rank_result for *_, rank_result in outcomes]  # type: ignore[misc]  # no rank failed, so none is missing


def _cause(error: BaseException) -> BaseException:
    is_wrapped = isinstance(error, CheckpointError) and error.__cause__ is not None
    return error.__cause__ if is_wrapped else error  # type: ignore[return-value]  # it is not None then


def _reason(error: BaseException) -> str:
    """Return an error's first line; for a failed write the disk's own message."""
    error = _cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
