"""Which checkpoints of a run stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class RetentionMarks:
    """What a checkpoint says about its own worth.

    Attributes:
        keep: Whether it stays for good.
        metric: What ``run.save`` was told; the lower the better. ``None`` where nothing was.
    """

    keep: bool = False
    metric: float | None = None

    def merge(self, later: RetentionMarks) -> RetentionMarks:
        """Both in one, where a step is saved twice."""
        return RetentionMarks(self.keep or later.keep, self.metric if later.metric is None else later.metric)


@dataclass(frozen=True)
class Retention:
    """How many checkpoints a run keeps, beside those that are marked to stay for good.

    Attributes:
        newest: So many of the newest.
        best: So many with the lowest metric.
        every: One for each so many steps stays for good; ``None`` for none.
    """

    newest: int = 3
    best: int = 0
    every: int | None = None

    def is_periodic(self, step: int, previous: int) -> bool:
        """Whether the checkpoint of ``step`` is the first in its stretch, the one before it being of ``previous``."""
        return self.every is not None and step // self.every > previous // self.every

    def expired(self, marks: Mapping[int, RetentionMarks]) -> list[int]:
        """The steps whose checkpoints may go.

        Args:
            marks: Of every checkpoint that is there, by step.

        Example:
            >>> marks = {step: RetentionMarks(metric=metric) for step, metric in {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.9}.items()}
            >>> Retention(newest=1, best=1).expired(marks)
            [1, 3]
        """
        ordinary = sorted(step for step, mark in marks.items() if not mark.keep)
        rated = [(metric, -step) for step in ordinary if (metric := _metric(marks[step])) < math.inf]
        stays = {*ordinary[-self.newest :], *(-negative for _, negative in sorted(rated)[: self.best])}
        return [step for step in ordinary if step not in stays]


def _metric(mark: RetentionMarks) -> float:
    """Training that diverged is no best one, whatever NaN compares like."""
    return math.inf if mark.metric is None or math.isnan(mark.metric) else mark.metric
