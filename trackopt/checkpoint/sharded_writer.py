"""Write a sharded checkpoint: all processes together, and nothing is published unless each of them has written."""

from __future__ import annotations

import importlib
import math
import os
import shutil
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from trackopt.archive.formats import manifest
from trackopt.archive.formats.directories import UNSHARDED_FILE
from trackopt.checkpoint.sharded import cause_of, commit_directory, reason_of
from trackopt.checkpoint.writer import PARTIAL_SUFFIX, write
from trackopt.errors import CheckpointError, RunError
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from trackopt.checkpoint.sharded import ShardedCheckpoint
    from trackopt.distributed.collectives import Collectives
    from trackopt.utils.types import CheckpointTree

T = TypeVar("T")


class ProcessGroupLost(CheckpointError):
    """A checkpoint was not written since the processes no longer reach each other.

    Attributes:
        path: The checkpoint.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: not written ({reason})")
        self.path = path


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
        problem = reason_of(error)
        advice = "; check free space and the disk" if isinstance(cause_of(error), OSError) else ""
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
