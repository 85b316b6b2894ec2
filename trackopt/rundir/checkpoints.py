"""The complete checkpoints of a run, by their file names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"step-(\d+)\.pt|step-(\d{8,})")  # a file, or the directory of a sharded one


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """Return a run's complete checkpoints, files or directories, by step, oldest first; none if it is no run.

    Args:
        directory: A run's directory, or its ``checkpoints``.
    """
    folder = directory / "checkpoints"
    by_step = {}
    for path in (folder if folder.is_dir() else directory).iterdir():
        if (match := _NAME.fullmatch(path.name)) and (match[1] or path.is_dir()):
            by_step[int(match[1] or match[2])] = path
    return dict(sorted(by_step.items()))
