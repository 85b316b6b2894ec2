"""The number of steps before the recording began, where neither the framework nor the optimizer knows it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.training.objects import Training

logger = logging.getLogger("trackopt")


class EarlierSteps:
    """How many steps were taken before the recording began, where the optimizer does not count them.

    The first recorded step shows how many iterations a step takes; the earlier ones are taken to have been like it.

    Args:
        iterations: Returns the number of iterations that the framework has begun.
        training: The objects that are trained.
        begin: Called once with the number of earlier steps: before the first step, or in ``settle``.
    """

    def __init__(self, iterations: Callable[[], int], training: Training, begin: Callable[[int], None]) -> None:
        self._begin = begin
        self._count = iterations
        self._iterations = iterations()
        self._handles = [each.register_step_pre_hook(self._before_step) for each in training.optimizers.values()]

    def settle(self, each: int = 1) -> None:
        """Take a step to have been taken in each of so many iterations, if no step has shown that before."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        steps, rest = divmod(self._iterations, each)
        if rest:
            logger.warning(
                "trackopt: the first recorded step took %d iterations, and the %d before are no multiple of that, so "
                "the number of earlier steps is estimated as %d",
                each,
                self._iterations,
                steps,
            )
        self._begin(steps)

    def _before_step(self, *_: Any) -> None:
        self.settle(max(1, self._count() - self._iterations))
