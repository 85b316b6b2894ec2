"""The checkpoints of one run: ``checkpoints/step-00000100.pt`` and its siblings."""

from __future__ import annotations

import logging
import pickle
from typing import TYPE_CHECKING, Any

import torch

from trackopt import integrity
from trackopt.checkpoint.capture import FORMAT
from trackopt.checkpoint.write import PART, write
from trackopt.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("trackopt")


class Store:
    """Commits checkpoints, finds the newest sound one, and keeps their number down.

    Args:
        folder: The run's ``checkpoints`` directory; it is made at the first commit.
        keep: How many of the newest to keep. Those committed with ``keep=True`` do not count and stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._kept: dict[Path, bool] = {}

    def paths(self) -> list[Path]:
        """The committed checkpoints, by step."""
        return sorted(self.folder.glob("step-*.pt"))

    def commit(self, tree: dict[str, Any], *, keep: bool, before_commit: Callable[[], None]) -> Path:
        """Write a captured tree under the name of its step, then let go of the oldest.

        Raises:
            CheckpointError: It could not be written; the earlier ones are untouched.
        """
        tree["trackopt"]["keep"] = keep
        path = self.folder / f"step-{tree['trackopt']['step']:08d}.pt"
        write(tree, path, before_commit=before_commit)
        self._kept[path] = keep
        for old in [each for each in self.paths() if not self._is_kept(each)][: -self._keep]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is sound, read; ``None`` where there is none at all.

        Raises:
            CheckpointError: There are some, but each is damaged, or (``MismatchError``) the newest sound one is of a
                kind that this version cannot use.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self.paths()):
            try:
                tree = load(path)
            except MismatchError:
                raise  # sound, and newer than what is behind it
            except CheckpointError as error:
                damaged[path] = str(error)
                continue
            self._set_aside(damaged)
            return path, tree
        if damaged:
            raise CheckpointError(f"no sound checkpoint is left: {'; '.join(damaged.values())}")
        return None

    def abandon_after(self, step: int) -> None:
        """Rename the checkpoints behind ``step``: training went back, and they belong to the future that it left."""
        for path in self.paths():
            if int(path.stem.removeprefix("step-")) > step:
                path.rename(path.with_name(f"{path.name}.abandoned"))

    def clean(self) -> None:
        """Remove what a killed writer left half-written."""
        for part in self.folder.glob(f".*{PART}"):
            part.unlink(missing_ok=True)

    def _is_kept(self, path: Path) -> bool:
        if path not in self._kept:
            self._kept[path] = bool(load(path)["trackopt"].get("keep"))
        return self._kept[path]

    def _set_aside(self, damaged: dict[Path, str]) -> None:
        for path, reason in damaged.items():
            path.rename(path.with_name(f"{path.name}.damaged"))
            logger.warning("trackopt: %s; it was set aside as %s.damaged", reason, path.name)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run after checking every byte of it.

    Raises:
        CheckpointError: It is missing or damaged.
        MismatchError: It is sound, but no checkpoint of a run.
    """
    if problems := integrity.check(path):
        raise CheckpointError(f"{path}: cannot be used ({problems[0]})")
    try:
        tree: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict) or "trackopt" not in tree:
        raise MismatchError(f"{path}: not a checkpoint of a trackopt run; resume from one that run.save() wrote")
    if tree["trackopt"]["format"] > FORMAT:
        raise MismatchError(f"{path}: written by a newer trackopt; update this one to resume from it")
    return tree
