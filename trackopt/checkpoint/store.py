"""Stage and commit the checkpoints of one run."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.folder import CheckpointFolder
from trackopt.checkpoint.meta import KEY
from trackopt.checkpoint.rank_states import remove_paths
from trackopt.checkpoint.readback import ReadBack
from trackopt.checkpoint.retention import RetainedCheckpoints, Retention, RetentionMarks
from trackopt.checkpoint.sharded import CpuStateDict, ShardedCheckpoint, split_sharded
from trackopt.checkpoint.sharded_writer import write_collectively
from trackopt.checkpoint.staging import Staging
from trackopt.checkpoint.writer import write
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged
    from trackopt.distributed.collectives import Collectives
    from trackopt.utils.types import CheckpointTree


class CheckpointStore:
    """Commits checkpoints, and deletes those that the retention does not keep.

    Args:
        folder: The run's ``checkpoints`` directory; the first commit creates it.
        retention: Which checkpoints to keep.
        collectives: The processes that share a sharded state. Its checkpoints are directories, which all of them
            write. By default this process has the complete state.

    Attributes:
        folder: The folder of the committed checkpoints.
    """

    def __init__(self, folder: Path, retention: Retention, collectives: Collectives | None = None) -> None:
        self.folder = CheckpointFolder(folder)
        self._retained = RetainedCheckpoints(self.folder, retention)
        self._collectives = collectives
        self._is_rank_zero = collectives is None or collectives.is_rank_zero
        self._staging = Staging()
        self._read_back = ReadBack()
        self._cpu_state = CpuStateDict()

    @property
    def is_collective(self) -> bool:
        """True if all processes write each checkpoint."""
        return self._collectives is not None

    def preallocate(self, size: int) -> None:
        """Allocate memory for a checkpoint of about ``size`` bytes; call it in a thread, so that the loop continues."""
        if self._collectives is None:
            with contextlib.suppress(CheckpointError):  # the save that needs the memory reports it
                self._staging.prepare(size)

    def stage(self, tree: CheckpointTree, marks: RetentionMarks) -> Staged | ShardedCheckpoint:
        """Copy a captured tree into memory for ``commit``; the checkpoint before it must be committed.

        Raises:
            UsageError: A state cannot be written, or could not be loaded.
            CheckpointError: There is not enough memory.
        """
        if self._collectives is None:
            self._mark(tree, marks)
            return self._staging.stage(tree)
        try:
            if self._is_rank_zero:
                self._mark(tree, marks)
            parts, rest = split_sharded(tree)
            parts = remove_paths(parts, self._own_paths(tree))
            staged = self._staging.stage(rest) if self._is_rank_zero else None
            return ShardedCheckpoint(self._cpu_state.copy(parts), staged)
        except (CheckpointError, MemoryError, RuntimeError) as error:  # torch raises RuntimeError for lack of memory
            return ShardedCheckpoint({}, None, error)

    def commit(self, staged: Staged | ShardedCheckpoint, step: int, before_commit: Callable[[], None]) -> Path:
        """Write a staged checkpoint under the name of its step, then delete those that are not kept.

        Raises:
            CheckpointError: It could not be written, or not be loaded; the earlier ones are untouched.
        """
        directory = self.folder.path / f"step-{step:08d}"
        file = directory.with_suffix(".pt")
        if isinstance(staged, ShardedCheckpoint):
            assert self._collectives is not None  # noqa: S101 - for mypy: only collectives stage sharded checkpoints
            path, replaced = directory, file
            staged = self._proven(staged, path)
            write_collectively(staged, path, self._collectives, before_commit=before_commit)
        else:
            path, replaced = file, directory
            self._read_back.check(staged, path)
            write(staged, path, before_commit=before_commit)
        if self._is_rank_zero:
            self.folder.remove(replaced)  # of the same step, saved by another number of processes
            self.folder.update_latest_link()
            self._retained.prune()
        return path

    def close(self) -> None:
        """Release the memory; nothing can be saved afterwards."""
        self._staging.release()
        self._cpu_state.clear()

    def close_group(self) -> None:
        """Close the process group; all ranks must call it."""
        if self._collectives is not None:
            self._collectives.close()

    def _own_paths(self, tree: CheckpointTree) -> list[Any]:
        """Return where this rank's values differ from rank 0's, which alone are written for all ranks."""
        if self._is_rank_zero or self._collectives is None:
            return []
        own = tree[KEY]["ranks"][self._collectives.rank - 1].get("own", {})
        return [path for path, _ in own.get("values", ())] + list(own.get("skipped", ()))

    def _proven(self, staged: ShardedCheckpoint, path: Path) -> ShardedCheckpoint:
        """Return a checkpoint with the error that the other processes are to learn of, if it cannot be loaded."""
        try:
            if staged.rest is not None:
                self._read_back.check(staged.rest, path)
        except CheckpointError as error:
            return replace(staged, error=error)
        return staged

    def _mark(self, tree: CheckpointTree, requested: RetentionMarks) -> None:
        tree[KEY] |= self._retained.mark(tree[KEY]["step"], requested).as_dict()
