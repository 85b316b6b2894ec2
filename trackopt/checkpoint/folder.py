"""The folder of a run's checkpoints: ``checkpoints/step-00000100.pt``, or a directory of that name without suffix."""

from __future__ import annotations

import contextlib
import logging
import shutil
from typing import TYPE_CHECKING

from trackopt.checkpoint import sharded
from trackopt.checkpoint.reader import load
from trackopt.checkpoint.writer import PARTIAL_SUFFIX
from trackopt.errors import ArchiveLimitError, CheckpointError, MismatchError
from trackopt.rundir.checkpoints import ABANDONED_SUFFIX, list_abandoned, list_checkpoints
from trackopt.utils.files import fsync_directory, replace

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.utils.types import CheckpointTree

LATEST = "latest"

logger = logging.getLogger("trackopt")


class CheckpointFolder:
    """The folder, and what is renamed, removed and linked in it.

    Args:
        path: The run's ``checkpoints`` directory; the first commit creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def by_step(self) -> dict[int, Path]:
        """Return the committed checkpoints by step, in order.

        Raises:
            CheckpointError: The folder cannot be listed.
        """
        try:
            return list_checkpoints(self.path) if self.path.exists() else {}
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed ({error.strerror}); check the disk") from error

    def load_latest(self) -> tuple[Path, CheckpointTree] | None:
        """Read the newest valid checkpoint; rename the damaged ones that are newer. ``None`` if there is none at all.

        Raises:
            CheckpointError: All checkpoints are damaged, or one cannot be read now.
            MismatchError: The newest valid one is of a kind that this version cannot use.
        """
        with contextlib.suppress(OSError):
            sharded.recover_interrupted_commit(self.path)
        damaged: dict[Path, str] = {}
        for path in reversed(self.by_step().values()):
            try:
                tree = load(path, own=True)
            except MismatchError:
                raise  # valid, and newer than the rest
            except CheckpointError as error:
                if isinstance(error.__cause__, (OSError, ArchiveLimitError)):
                    raise  # perhaps valid: a disk that fails now may not fail tomorrow
                damaged[path] = str(error)
                continue
            self._quarantine(damaged)
            return path, tree
        if damaged:
            raise CheckpointError(f"no valid checkpoint is left: {'; '.join(damaged.values())}")
        return None

    def discard_after(self, step: int) -> None:
        """Rename the checkpoints after ``step``: the resume has superseded them."""
        for later, path in self.by_step().items():
            if later > step:
                _rename(path, ABANDONED_SUFFIX)
        self.update_latest_link()

    def remove_abandoned(self, step: int) -> None:
        """Remove the checkpoints up to ``step`` that ``discard_after`` has renamed, after the run has passed it."""
        with contextlib.suppress(OSError):  # what stays does no harm
            for abandoned, path in list_abandoned(self.path).items():
                if abandoned <= step:
                    self.remove(path)

    def remove_partial(self) -> None:
        """Remove the partial files of a killed writer; what cannot be removed does no harm."""
        with contextlib.suppress(OSError):
            for part in self.path.glob(f".*{PARTIAL_SUFFIX}"):
                _delete(part)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint; a directory is renamed first, since half of it must not pass for a checkpoint."""
        try:
            if path.is_dir():
                path = path.replace(path.with_name(f".{path.name}{PARTIAL_SUFFIX}"))
            _delete(path)
        except OSError as error:
            logger.warning("trackopt: %s: cannot be removed (%s)", path, error.strerror)

    def update_latest_link(self) -> None:
        """Point the link ``latest`` to the newest checkpoint, for other tools."""
        link, paths = self.path / LATEST, list(self.by_step().values())
        part = link.with_name(f".{LATEST}{PARTIAL_SUFFIX}")
        try:
            if not paths:
                link.unlink(missing_ok=True)
                return
            part.unlink(missing_ok=True)
            part.symlink_to(paths[-1].name)
            part.replace(link)
            fsync_directory(self.path)
        except OSError as error:
            logger.debug("trackopt: %s: not updated (%s)", link, error)  # some file systems have no links

    def _quarantine(self, damaged: dict[Path, str]) -> None:
        for path, reason in damaged.items():
            _rename(path, ".damaged")
            logger.warning("trackopt: %s; it was renamed to %s.damaged", reason, path.name)
        if damaged:
            self.update_latest_link()


def _rename(path: Path, suffix: str) -> None:
    """Add a suffix to a checkpoint's name; one that has that name already is replaced."""
    renamed = path.with_name(f"{path.name}{suffix}")
    if renamed.is_dir():
        shutil.rmtree(renamed)
    replace(path, renamed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
