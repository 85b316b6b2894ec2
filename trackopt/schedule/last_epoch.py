"""What ``last_epoch`` does: a schedule that is resumed by it, beside the same schedule from the start."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.errors import UsageError
from trackopt.schedule.classes import factory, last_epoch, without_last_epoch
from trackopt.schedule.preview import Preview, dummy_optimizer, preview

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trackopt.schedule.expression import Call

_LATEST = 1_000_000


@dataclass(frozen=True)
class ResumeComparison:
    """Three previews of one schedule.

    Attributes:
        completed_steps: Steps before it is resumed: ``last_epoch`` counts them from 0, so there is one more.
        uninterrupted: From the start, as if it had never stopped.
        restored: Resumed on an optimizer whose state was loaded first.
        restarted: Resumed on a new optimizer, with the LR that it was built with.
    """

    completed_steps: int
    uninterrupted: Preview
    restored: Preview
    restarted: Preview

    def first_difference(self, resumed: Preview) -> tuple[int, float, float] | None:
        """Where a resumed schedule first has another LR than the whole one: the step, its LR, and the right one.

        ``None`` if it never has.
        """
        found = [
            (step, rate, right)
            for name, rates in resumed.lr.items()
            for step, rate, right in zip(
                resumed.steps, rates, self.uninterrupted.lr[name][self.completed_steps :], strict=True
            )
            if not math.isclose(rate, right, rel_tol=1e-9)
        ]
        return min(found, default=None)


def resumption(call: Call, steps: int, lr: Sequence[float]) -> ResumeComparison:
    """Resume a schedule by its ``last_epoch``, for so many steps.

    Args:
        call: The schedule; its ``last_epoch`` is 0 or more.
        steps: How many to preview after it was resumed.
        lr: Of each parameter group; it is their ``initial_lr``, too.

    Raises:
        UsageError: torch refuses the schedule, or ``last_epoch`` is beyond a million.

    Example:
        >>> from trackopt.schedule.expression import parse
        >>> found = resumption(parse("ExponentialLR(0.5, last_epoch=1)"), 2, [0.8])
        >>> found.uninterrupted.lr["group0"], found.restored.lr["group0"], found.restarted.lr["group0"]
        ([0.8, 0.4, 0.2, 0.1], [0.2, 0.1], [0.8, 0.4])
    """
    done = last_epoch(call) + 1
    if done > _LATEST:
        raise UsageError(f"last_epoch={done - 1}: too far to show; a million is the most")
    build, begin = factory(call), factory(without_last_epoch(call))
    optimizer = dummy_optimizer(lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch misses the steps of the optimizer
        scheduler = begin(optimizer)
        for _ in range(done):
            scheduler.step()
    new = copy.deepcopy(optimizer)
    for group, rate in zip(new.param_groups, lr, strict=True):
        group["lr"] = rate
    return ResumeComparison(
        done,
        preview(begin, done + steps, lr=lr),
        preview(build, steps, optimizer=optimizer),
        preview(build, steps, optimizer=new),
    )
