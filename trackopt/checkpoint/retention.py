"""Retention: the checkpoints of a run that are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import locations
from trackopt.checkpoint.meta import KEY
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trackopt.checkpoint.folder import CheckpointFolder
    from trackopt.utils.types import JsonObject


@dataclass(frozen=True)
class RetentionMarks:
    """The marks of a checkpoint that decide how long it is kept; two keys of its entry ``trackopt``.

    Attributes:
        keep: Whether it is kept for good.
        metric: The metric that ``run.save`` was given; the lower the better. ``None`` without one.
    """

    keep: bool = False
    metric: float | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> RetentionMarks:
        """Read the marks from the entry ``trackopt``."""
        metric = entry.get("metric")
        return cls(bool(entry.get("keep")), metric if isinstance(metric, float) else None)

    def as_dict(self) -> JsonObject:
        """Return the keys of the entry ``trackopt``."""
        return {"keep": self.keep, "metric": self.metric}

    def merge(self, later: RetentionMarks) -> RetentionMarks:
        """Combine the marks of a step that is saved twice."""
        return RetentionMarks(self.keep or later.keep, self.metric if later.metric is None else later.metric)


@dataclass(frozen=True)
class Retention:
    """The numbers of checkpoints that a run keeps, besides those marked with ``keep=True``.

    Attributes:
        newest: How many of the newest.
        best: How many with the lowest metric.
        every: The first checkpoint in each stretch of so many steps is kept for good; ``None`` for none.
    """

    newest: int = 3
    best: int = 0
    every: int | None = None

    def is_periodic(self, step: int, previous: int) -> bool:
        """Return whether ``step`` is the first checkpoint in its stretch, given the step of the one before."""
        return self.every is not None and step // self.every > previous // self.every

    def expired(self, marks: Mapping[int, RetentionMarks]) -> list[int]:
        """Return the steps whose checkpoints can be deleted.

        Example:
            >>> metrics = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.9}
            >>> Retention(newest=1, best=1).expired({step: RetentionMarks(False, m) for step, m in metrics.items()})
            [1, 3]
        """
        ordinary = sorted(step for step, mark in marks.items() if not mark.keep)
        rated = [(metric, -step) for step in ordinary if (metric := _finite_metric(marks[step])) < math.inf]
        kept = {*ordinary[-self.newest :], *(-negative for _, negative in sorted(rated)[: self.best])}
        return [step for step in ordinary if step not in kept]


class RetainedCheckpoints:
    """The checkpoints of a run's folder under a retention.

    Args:
        folder: The run's ``checkpoints`` directory.
        retention: Which of them to keep.
    """

    def __init__(self, folder: CheckpointFolder, retention: Retention) -> None:
        self._folder = folder
        self._retention = retention
        self._marks: dict[int, RetentionMarks] = {}

    def mark(self, step: int, requested: RetentionMarks) -> RetentionMarks:
        """Return the marks that the next checkpoint is written with."""
        previous = max((saved for saved in self._folder.by_step() if saved < step), default=0)
        periodic = RetentionMarks(self._retention.is_periodic(step, previous))
        self._marks[step] = self._marks.get(step, periodic).merge(periodic).merge(requested)
        return self._marks[step]

    def prune(self) -> None:
        """Delete the checkpoints that are not kept."""
        paths = self._folder.by_step()
        for step in self._retention.expired({step: self._read_marks(step, path) for step, path in paths.items()}):
            self._folder.remove(paths[step])

    def _read_marks(self, step: int, path: Path) -> RetentionMarks:
        """Return a checkpoint's marks; an earlier attempt's are in the file, and an unreadable file is kept."""
        if step not in self._marks:
            try:
                with locations.open(path) as opened:
                    self._marks[step] = RetentionMarks.from_dict(opened.tree[KEY])
            except (ArchiveError, KeyError, TypeError, AttributeError):
                self._marks[step] = RetentionMarks(keep=True)
        return self._marks[step]


def _finite_metric(mark: RetentionMarks) -> float:
    """Return the metric; a missing one and the NaN of a diverged training count as infinite."""
    return math.inf if mark.metric is None or math.isnan(mark.metric) else mark.metric
