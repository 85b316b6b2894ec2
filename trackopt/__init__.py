"""trackopt: see what an optimizer does, stop and resume training bit for bit, look inside any checkpoint.

The names here are the whole public API. They are loaded when first used, so that ``import trackopt`` and the
commands that only read never import torch, MLflow or TensorBoard.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from trackopt.errors import (
    ArchiveError,
    CheckpointError,
    MismatchError,
    RunError,
    TrackoptError,
    UsageError,
)
from trackopt.utils.packages import explain_missing
from trackopt.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from trackopt import journal
    from trackopt.analysis.diff import diff
    from trackopt.archive import Archive
    from trackopt.checkpoint.restore import RestoreResult, restore
    from trackopt.locations import open  # noqa: A004 - `trackopt.open` is meant to read like the built-in
    from trackopt.run.run import Run
    from trackopt.run.wrap import wrap
    from trackopt.schedule.preview import Preview, preview

_HOMES = {
    "Archive": "trackopt.archive",
    "Preview": "trackopt.schedule.preview",
    "RestoreResult": "trackopt.checkpoint.restore",
    "Run": "trackopt.run.run",
    "diff": "trackopt.analysis.diff",
    "open": "trackopt.locations",
    "preview": "trackopt.schedule.preview",
    "restore": "trackopt.checkpoint.restore",
    "wrap": "trackopt.run.wrap",
}

__all__ = [
    "Archive",
    "ArchiveError",
    "CheckpointError",
    "MismatchError",
    "Preview",
    "RestoreResult",
    "Run",
    "RunError",
    "TrackoptError",
    "UsageError",
    "diff",
    "journal",
    "open",
    "preview",
    "restore",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name == "journal":
        return import_module("trackopt.journal")
    if name not in _HOMES:
        raise AttributeError(f"module 'trackopt' has no attribute {name!r}")
    with explain_missing(f"trackopt.{name}"):
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
