"""Compare a schedule that is resumed by ``last_epoch`` with the same schedule from the start."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.errors import UsageError
from trackopt.schedule.classes import get_last_epoch, make_factory, without_last_epoch
from trackopt.schedule.preview import Preview, dummy_optimizer, preview

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trackopt.schedule.expression import Call

_MAX_LAST_EPOCH = 1_000_000


@dataclass(frozen=True)
class ResumeComparison:
    """Three previews of one schedule.

    Attributes:
        completed_steps: Steps before the resume: ``last_epoch`` + 1, since it counts from 0.
        uninterrupted: From the start, without an interruption.
        restored: Resumed on an optimizer whose state was loaded first.
        restarted: Resumed on a new optimizer with its initial LR.
    """

    completed_steps: int
    uninterrupted: Preview
    restored: Preview
    restarted: Preview

    def first_difference(self, resumed: Preview) -> tuple[int, float, float] | None:
        """Return the first step at which a resumed schedule has a wrong LR, that LR and the right one, or ``None``."""
        differences = [
            (step, rate, expected)
            for name, rates in resumed.lr.items()
            for step, rate, expected in zip(
                resumed.steps, rates, self.uninterrupted.lr[name][self.completed_steps :], strict=True
            )
            if not math.isclose(rate, expected, rel_tol=1e-9)
        ]
        return min(differences, default=None)


def compare_resume(call: Call, steps: int, lr: Sequence[float]) -> ResumeComparison:
    """Resume a schedule by its ``last_epoch`` and compare it with the uninterrupted one.

    Older versions of torch, such as 2.6, step a scheduler that is built with ``last_epoch``. With them a schedule that
    multiplies the present LR, as ExponentialLR does, is a factor ahead on a restored optimizer, too.

    Args:
        call: The schedule; its ``last_epoch`` is 0 or more.
        steps: Steps to preview after the resume.
        lr: The LR of each parameter group, also its ``initial_lr``.

    Raises:
        UsageError: torch refuses the schedule, or ``last_epoch`` is over a million.

    Example:
        >>> from trackopt.schedule.expression import parse
        >>> comparison = compare_resume(parse("StepLR(2, 0.5, last_epoch=2)"), 2, [0.8])
        >>> [run.lr["group0"] for run in (comparison.uninterrupted, comparison.restored, comparison.restarted)]
        [[0.8, 0.8, 0.4, 0.4, 0.2], [0.4, 0.2], [0.8, 0.4]]
    """
    completed_steps = get_last_epoch(call) + 1
    if completed_steps > _MAX_LAST_EPOCH:
        raise UsageError(f"last_epoch={completed_steps - 1}: too far to show; a million is the most")
    build, build_from_start = make_factory(call), make_factory(without_last_epoch(call))
    optimizer = dummy_optimizer(lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the optimizer was not stepped
        scheduler = build_from_start(optimizer)
        for _ in range(completed_steps):
            scheduler.step()
    restarted = copy.deepcopy(optimizer)
    for group, rate in zip(restarted.param_groups, lr, strict=True):
        group["lr"] = rate
    return ResumeComparison(
        completed_steps,
        preview(build_from_start, completed_steps + steps, lr=lr),
        preview(build, steps, optimizer=optimizer),
        preview(build, steps, optimizer=restarted),
    )
