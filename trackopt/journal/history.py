"""Which records of a journal count: those that no resume has superseded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trackopt.journal.lines import Line


@dataclass(frozen=True)
class Stretch:
    """The part of one attempt that belongs to the history.

    Attributes:
        attempt: The attempt: 0 before the first resume marker, n after the n-th.
        max_step: Its records up to this step belong to it, …
        end_offset: … if they start before this offset.
    """

    attempt: int
    max_step: float
    end_offset: float


def find_history(resumes: Sequence[Line]) -> list[Stretch]:
    """Return the stretches of the history that the latest attempt continues, and its own, from the first to the last.

    A checkpoint of an abandoned attempt brings back the records before it.

    Args:
        resumes: The resume markers of a journal, in its order.
    """
    attempt, max_step, end_offset = len(resumes), math.inf, math.inf
    history = [Stretch(attempt, max_step, end_offset)]
    while attempt:
        marker = resumes[attempt - 1]
        offset = checkpoint_offset(marker)
        max_step, end_offset = min(max_step, marker.step), min(end_offset, offset)
        attempt -= 1
        if attempt and offset < resumes[attempt - 1].start_offset:
            attempt = sum(1 for earlier in resumes[:attempt] if earlier.start_offset < offset)
        history.append(Stretch(attempt, max_step, end_offset))
    return history[::-1]


def effective(lines: Iterable[Line]) -> list[Line]:
    """Return the records that are not superseded, in the order of their steps.

    They are the history of the checkpoint that the latest attempt resumed from, followed by its own. A step has one
    record; metrics that are logged after it (a validation loss) are a second line of the same step.

    Example:
        >>> from trackopt.journal import Line
        >>> effective([Line(1, 0.0, {"loss": 2.0}), Line(2, 0.0, {"loss": 1.5}),
        ...            Line(1, 0.0, event="resume"), Line(2, 0.0, {"loss": 1.4})])[-1].metrics
        {'loss': 1.4}
    """
    resumes: list[Line] = []
    attempts: list[list[Line]] = [[]]
    for line in lines:
        if line.event == "resume":
            resumes.append(line)
            attempts.append([])
        elif line.event is None:
            attempts[-1].append(line)
    return [
        record
        for stretch in find_history(resumes)
        for record in attempts[stretch.attempt]
        if record.step <= stretch.max_step and record.start_offset < stretch.end_offset
    ]


def superseded(record: Line, resume: Line) -> bool:
    """Return whether a record from before a ``resume`` marker is superseded by it.

    The marker's ``offset`` is the length of the journal when the checkpoint was taken: records of the checkpoint's own
    step that were logged after the checkpoint are superseded as well.
    """
    return record.step > resume.step or record.start_offset >= checkpoint_offset(resume)


def checkpoint_offset(resume: Line) -> float:
    """Return the ``offset`` of a resume marker; infinite if it has none."""
    offset = resume.details.get("offset")
    return offset if isinstance(offset, int | float) else math.inf
