"""The checkpoint of a training that is spread over processes: a directory into which all of them write.

::

    step-00000100/
      __0_0.distcp …   what each process has of models and optimizers, by torch.distributed.checkpoint (DCP)
      .metadata        DCP's, what is where; any number of processes can read it
      training.pt      everything else: schedulers, random generators, positions, the run's own entry
      manifest.json    the checksum of each file

It is written under another name, the last file last, and gets its own when all processes are done.
"""

from __future__ import annotations

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
from trackopt.checkpoint.resharding import LazyTensor
from trackopt.checkpoint.writer import PARTIAL_SUFFIX, write
from trackopt.errors import ArchiveError, CheckpointError, TrackoptError
from trackopt.training.sharding import contains_dtensor, is_dtensor, to_local
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged
    from trackopt.distributed.collectives import Collectives

_BACKUP_SUFFIX = ".before"
_SHARDED_KEYS = ("model", "optimizer")

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedCheckpoint:
    """One checkpoint in the memory of all processes.

    Attributes:
        parts: What this one has of what is spread.
        rest: Everything else; only the first process has it.
        error: Why this one has nothing, where that is so; the others learn of it when they write.
    """

    parts: dict[str, Any]
    rest: Staged | None
    error: Exception | None = None


class CpuStateDict:
    """Copies of live tensors, in memory that every save uses again."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        """The same tree with copies of its tensors on the CPU; the copy from a GPU is waited for."""
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), path)
        if isinstance(value, dict):
            return {key: self.copy(each, (*path, key)) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy(each, (*path, index)) for index, each in enumerate(value))
        return value

    def clear(self) -> None:
        """Let go of the memory."""
        self._held.clear()

    def _tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
        part = to_local(tensor)
        held = self._held.get(path)
        if held is None or (held.shape, held.dtype) != (part.shape, part.dtype):
            held = self._held[path] = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=part.is_cuda)
        held.copy_(part)
        if not is_dtensor(tensor):
            return held
        from torch.distributed.tensor import DTensor

        # from_local would take it back to the device
        return DTensor(held, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def split_sharded(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a captured tree is spread, and the rest."""
    parts = {key: value for key, value in tree.items() if key in _SHARDED_KEYS or contains_dtensor(value)}
    return parts, {key: value for key, value in tree.items() if key not in parts}


def write_collectively(
    shards: ShardedCheckpoint, path: Path, collectives: Collectives, *, before_commit: Callable[[], None]
) -> None:
    """Write a checkpoint as a directory and commit it: every process calls this, and each returns when it is there.

    Args:
        shards: What this process has.
        path: The directory's final name; it appears when everything is on the disk.
        collectives: The processes; nobody else may use their group meanwhile.
        before_commit: Called by the first one when only the rename is left.

    Raises:
        CheckpointError: On all of them, where one could not write; the name and all earlier ones are as they were.
    """
    part = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    leads = collectives.rank == 0

    def begin() -> None:
        if shards.error is not None:
            raise shards.error
        if leads:
            _make(part)

    try:
        _run_on_all(collectives, path, begin)
        _run_on_all(collectives, path, lambda: _write_parts(shards.parts, part, collectives))
        sums = _run_on_all(
            collectives,
            path,
            lambda: {file.name: manifest.checksum(file) for file in _own_files(part, collectives.rank)},
        )

        def commit() -> None:
            assert shards.rest is not None  # noqa: S101 - for mypy: it leads
            write(shards.rest, part / UNSHARDED_FILE, before_commit=lambda: None)
            listed = {name: each for own in sums for name, each in own.items()}
            listed |= {name: manifest.checksum(part / name) for name in (".metadata", UNSHARDED_FILE)}
            _write_synced(part / manifest.NAME, manifest.encode(listed))
            before_commit()
            commit_directory(part, path)

        _run_on_all(collectives, path, lambda: commit() if leads else None)
    except TrackoptError as error:
        if leads:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not written ({error})") from error


def commit_directory(part: Path, path: Path) -> None:
    """Give a directory its name. One that has it steps aside for that moment; `recover_interrupted_commit` brings it back."""
    before = path.with_name(f".{path.name}{_BACKUP_SUFFIX}")
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)  # of a writer that was killed when its own had the name
        path.rename(before)
    part.rename(path)
    fsync_directory(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def recover_interrupted_commit(folder: Path) -> None:
    """Bring back what had stepped aside when its writer was killed."""
    for before in folder.glob(f".*{_BACKUP_SUFFIX}"):
        path = before.with_name(before.name[1 : -len(_BACKUP_SUFFIX)])
        if path.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(path)


def load(path: Path) -> dict[str, Any]:
    """The tree of a checkpoint; what is spread is `LazyTensor` in it, and is read when it is clear how much is wanted.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        opened = locations.open(path)
        rest = torch.load(path / UNSHARDED_FILE, map_location="cpu", weights_only=True)
        return {key: _stored(opened, node) for key, node in opened.tree.items() if key not in rest} | dict(rest)
    except (ArchiveError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({_reason(error)})") from error


def _stored(opened: archive.Archive, node: Any) -> Any:
    if isinstance(node, archive.Tensor):
        stored = LazyTensor(opened, node)
        return stored if stored.shape else stored.read()  # a single number is nowhere in parts
    if isinstance(node, dict):
        return {key: _stored(opened, each) for key, each in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_stored(opened, each) for each in node)
    if isinstance(node, UnknownObject):
        raise ArchiveError(f"it holds {node!r}, which would have to be run")
    return node


def _make(part: Path) -> None:
    part.parent.mkdir(exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    fsync_directory(part.parent)


def _write_parts(parts: dict[str, Any], part: Path, collectives: Collectives) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(parts, storage_writer=FileSystemWriter(part), process_group=collectives.group)
    except CheckpointException as error:  # it is none of python's, and in each process that of all
        if collectives.rank in error.failures:
            raise error.failures[collectives.rank][0] from None


def _own_files(part: Path, rank: int) -> list[Path]:
    return sorted(part.glob(f"__{rank}_*"))


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_directory(file.parent)


def _run_on_all(collectives: Collectives, path: Path, action: Callable[[], T]) -> list[T]:
    """What an action returns in each process.

    Raises:
        CheckpointError: It failed in one of them.
    """
    result, problem = None, ""
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - the others wait for what became of it
        problem = _reason(error)
    told = collectives.all_gather_object((problem, result))
    for rank, (each, _) in enumerate(told):
        if each:
            where = f"rank {rank}: " if len(told) > 1 else ""
            raise CheckpointError(f"{path}: not written ({where}{each}); free some space or mend the disk")
    return [each for _, each in told]  # type: ignore[misc]  # nobody failed, so all are there


def _reason(error: BaseException) -> str:
    """In a line; of our own errors what the disk said."""
    if isinstance(error, CheckpointError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
