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

import pickle
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt import archive, locations
from trackopt.archive.formats.directories import UNSHARDED_FILE
from trackopt.archive.tree import UnknownObject
from trackopt.checkpoint.resharding import LazyTensor, decode_key
from trackopt.errors import ArchiveError, CheckpointError
from trackopt.training.sharding import contains_dtensor, is_dtensor, to_local
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged
    from trackopt.utils.types import CheckpointTree

_BACKUP_SUFFIX = ".before"
_SHARDED_KEYS = ("model", "optimizer")


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
        raise CheckpointError(f"{path}: cannot be loaded ({reason_of(error)})") from error


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


def cause_of(error: BaseException) -> BaseException:
    """Return the error from which a `CheckpointError` was raised, if it was."""
    is_wrapped = isinstance(error, CheckpointError) and error.__cause__ is not None
    return error.__cause__ if is_wrapped else error  # type: ignore[return-value]  # it is not None then


def reason_of(error: BaseException) -> str:
    """Return an error's first line; for a failed write the disk's own message."""
    error = cause_of(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
