"""The checkpoints of one run: ``checkpoints/step-00000100.pt`` and its siblings, or directories of such names."""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import torch

from trackopt import locations, remote
from trackopt.archive import verify
from trackopt.checkpoint import sharded
from trackopt.checkpoint.retention import Retention, RetentionMarks
from trackopt.checkpoint.sharded import CpuStateDict, ShardedCheckpoint
from trackopt.checkpoint.snapshot import FORMAT
from trackopt.checkpoint.staging import Staging
from trackopt.checkpoint.writer import PARTIAL_SUFFIX, write
from trackopt.errors import ArchiveError, CheckpointError, MismatchError
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged
    from trackopt.distributed.collectives import Collectives

LATEST = "latest"

logger = logging.getLogger("trackopt")


class CheckpointStore:
    """Commits checkpoints, finds the newest sound one, and keeps their number down.

    Args:
        folder: The run's ``checkpoints`` directory; it is made at the first commit.
        retention: Which of them stay.
        collectives: The processes that share the training's state: its checkpoints are directories then, which all of
            them write. By default this process has all of it.
    """

    def __init__(self, folder: Path, retention: Retention, collectives: Collectives | None = None) -> None:
        self.folder = folder
        self._retention = retention
        self._collectives = collectives
        self._leads = collectives is None or collectives.rank == 0
        self._staging = Staging()
        self._shards = CpuStateDict()
        self._marks: dict[int, RetentionMarks] = {}

    @property
    def is_collective(self) -> bool:
        """Whether all processes write each checkpoint."""
        return self._collectives is not None

    def paths(self) -> list[Path]:
        """The committed checkpoints, by step."""
        return list(self._by_step().values())

    def preallocate(self, size: int) -> None:
        """Have memory ready for a checkpoint of about ``size`` bytes; in a thread of its own the loop feels nothing."""
        if self._collectives is None:
            with contextlib.suppress(CheckpointError):  # the save that needs it tells
                self._staging.prepare(size)

    def stage(self, tree: dict[str, Any], marks: RetentionMarks) -> Staged | ShardedCheckpoint:
        """Copy a captured tree into memory, where it waits for ``commit``; the one before it must be committed.

        Raises:
            UsageError: A state cannot be written.
            CheckpointError: There is not enough memory.
        """
        if self._collectives is None:
            self._mark(tree["trackopt"], marks)
            return self._staging.stage(tree)
        try:
            if self._leads:
                self._mark(tree["trackopt"], marks)
            parts, rest = sharded.split_sharded(tree)
            return ShardedCheckpoint(self._shards.copy(parts), self._staging.stage(rest) if self._leads else None)
        except (CheckpointError, MemoryError, RuntimeError) as error:  # the last is torch's for memory
            return ShardedCheckpoint({}, None, error)

    def commit(self, staged: Staged | ShardedCheckpoint, step: int, before_commit: Callable[[], None]) -> Path:
        """Write a staged checkpoint under the name of its step, then let go of those that are not kept.

        Raises:
            CheckpointError: It could not be written; the earlier ones are untouched.
        """
        path = self.folder / f"step-{step:08d}"
        file = path.with_suffix(".pt")
        if isinstance(staged, ShardedCheckpoint):
            assert self._collectives is not None  # noqa: S101 - for mypy: they were staged for these
            sharded.write_collectively(staged, path, self._collectives, before_commit=before_commit)
        else:
            path, file = file, path
            write(staged, path, before_commit=before_commit)
        if self._leads:
            self._remove(file)  # of the same step, from an attempt on another number of processes
            self._update_latest_link()
            self._apply_retention()
        return path

    def close(self) -> None:
        """Let go of the memory; nothing is saved any more."""
        self._staging.release()
        self._shards.clear()

    def close_group(self) -> None:
        """Let go of the other processes, as all of them do now."""
        if self._collectives is not None:
            self._collectives.close()

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is sound, read; ``None`` where there is none at all.

        Raises:
            CheckpointError: There are some, but each is damaged; one cannot be read now; or (``MismatchError``) the
                newest sound one is of a kind that this version cannot use.
        """
        with contextlib.suppress(OSError):
            sharded.recover_interrupted_commit(self.folder)
        damaged: dict[Path, str] = {}
        for path in reversed(self.paths()):
            try:
                tree = load(path)
            except MismatchError:
                raise  # sound, and newer than what is behind it
            except CheckpointError as error:
                if isinstance(error.__cause__, OSError):
                    raise  # it may be sound: a disk that fails now may not fail tomorrow
                damaged[path] = str(error)
                continue
            self._quarantine(damaged)
            return path, tree
        if damaged:
            raise CheckpointError(f"no sound checkpoint is left: {'; '.join(damaged.values())}")
        return None

    def discard_after(self, step: int) -> None:
        """Rename the checkpoints behind ``step``: training went back, and they belong to the future that it left."""
        for path in self.paths():
            if int(path.stem.removeprefix("step-")) > step:
                _rename(path, "abandoned")
        self._update_latest_link()

    def remove_partial(self) -> None:
        """Remove what a killed writer left half-written; what cannot be removed is in nobody's way."""
        with contextlib.suppress(OSError):
            for part in self.folder.glob(f".*{PARTIAL_SUFFIX}"):
                _delete(part)

    def _mark(self, meta: dict[str, Any], marks: RetentionMarks) -> None:
        """Let a checkpoint say what it is worth."""
        step = meta["step"]
        previous = max((each for each in self._by_step() if each < step), default=0)
        landmark = RetentionMarks(self._retention.is_periodic(step, previous))
        marks = self._marks.get(step, landmark).merge(landmark).merge(marks)
        meta |= {"keep": marks.keep, "metric": marks.metric}
        self._marks[step] = marks

    def _by_step(self) -> dict[int, Path]:
        try:
            return list_checkpoints(self.folder) if self.folder.exists() else {}
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be listed ({error.strerror}); mend the disk") from error

    def _apply_retention(self) -> None:
        there = self._by_step()
        for step in self._retention.expired({step: self._read_marks(step, path) for step, path in there.items()}):
            self._remove(there[step])

    def _remove(self, path: Path) -> None:
        """Under another name first: what is half there must not be taken for a checkpoint."""
        try:
            if path.is_dir():
                path = path.replace(path.with_name(f".{path.name}{PARTIAL_SUFFIX}"))
            _delete(path)
        except OSError as error:
            logger.warning("trackopt: %s: cannot be removed (%s)", path, error.strerror)

    def _read_marks(self, step: int, path: Path) -> RetentionMarks:
        """Those of an earlier attempt's are in the file; what cannot be read is not for us to delete."""
        if step not in self._marks:
            try:
                with locations.open(path) as opened:
                    meta = opened.tree["trackopt"]
                    metric = meta.get("metric")
                    self._marks[step] = RetentionMarks(
                        bool(meta.get("keep")), metric if isinstance(metric, float) else None
                    )
            except (ArchiveError, KeyError, TypeError, AttributeError):
                self._marks[step] = RetentionMarks(keep=True)
        return self._marks[step]

    def _update_latest_link(self) -> None:
        """Let ``latest`` lead to the newest one, for other tools."""
        link, paths = self.folder / LATEST, self.paths()
        part = link.with_name(f".{LATEST}{PARTIAL_SUFFIX}")
        try:
            if not paths:
                link.unlink(missing_ok=True)
                return
            part.unlink(missing_ok=True)
            part.symlink_to(paths[-1].name)
            part.replace(link)
            fsync_directory(self.folder)
        except OSError as error:
            logger.debug("trackopt: %s: not updated (%s)", link, error)  # some file systems have no links

    def _quarantine(self, damaged: dict[Path, str]) -> None:
        for path, reason in damaged.items():
            _rename(path, "damaged")
            logger.warning("trackopt: %s; it was set aside as %s.damaged", reason, path.name)
        if damaged:
            self._update_latest_link()


def _rename(path: Path, why: str) -> None:
    """Put a checkpoint out of the way; what stands there from another time gives way."""
    aside = path.with_name(f"{path.name}.{why}")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.rename(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run, which may be an artifact elsewhere, after checking every byte of it.

    Raises:
        CheckpointError: It is missing or damaged.
        MismatchError: It is sound, but no checkpoint of a run.
    """
    path = _ensure_local(path)
    if problems := _problems(path):
        raise CheckpointError(f"{path}: cannot be used ({problems[0]})")
    with contextlib.suppress(CheckpointError):  # the bytes are sound, so a disk that failed may not fail again
        return load_unverified(path)
    return load_unverified(path)


def _ensure_local(path: Path) -> Path:
    return remote.fetch(path) if remote.is_remote(path) else path


def _problems(path: Path) -> list[str]:
    """What is wrong with its bytes; a disk that does not give them is no damage to them."""
    try:
        with locations.open(path) as opened:
            return verify.find_problems(opened)
    except (ArchiveError, OSError) as error:
        trouble = error.__cause__ if isinstance(error, ArchiveError) else error
        missing = isinstance(trouble, FileNotFoundError) and path.exists()  # one of its files
        if missing or not isinstance(trouble, OSError):
            return [str(error).removeprefix(f"{path}: ")]
        raise CheckpointError(
            f"{path}: cannot be read ({trouble.strerror}); try again, or move it away to go on from the one before"
        ) from trouble


def load_unverified(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run whose bytes were checked already.

    Raises:
        CheckpointError: It is missing.
        MismatchError: It is no checkpoint of a run.
    """
    path = _ensure_local(path)
    try:
        tree = sharded.load(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict) or "trackopt" not in tree:
        raise MismatchError(f"{path}: not a checkpoint of a trackopt run; resume from one that run.save() wrote")
    if tree["trackopt"]["format"] > FORMAT:
        raise MismatchError(f"{path}: written by a newer trackopt; update this one to resume from it")
    return tree
