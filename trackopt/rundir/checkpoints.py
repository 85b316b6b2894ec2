"""The complete checkpoints of a run, by their file names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

ABANDONED_SUFFIX = ".abandoned"  # of those that a resume from an earlier step has superseded
_NAME = re.compile(r"step-(\d+)\.pt|step-(\d{8,})")  # a file, or the directory of a sharded one


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """Return a run's complete checkpoints, files or directories, by step, oldest first; none if it is no run.

    Args:
        directory: A run's directory, or its ``checkpoints``.
    """
    return _by_step(directory, "")


def list_abandoned(directory: Path) -> dict[int, Path]:
    """Return the checkpoints by step that a resume from an earlier one has superseded.

    Args:
        directory: A run's directory, or its ``checkpoints``.
    """
    return _by_step(directory, ABANDONED_SUFFIX)


def _by_step(directory: Path, suffix: str) -> dict[int, Path]:
    folder = directory / "checkpoints"
    by_step = {}
    for path in (folder if folder.is_dir() else directory).iterdir():
        name = path.name.removesuffix(suffix)
        if path.name == name + suffix and (match := _NAME.fullmatch(name)) and (match[1] or path.is_dir()):
            by_step[int(match[1] or match[2])] = path
    return dict(sorted(by_step.items()))
