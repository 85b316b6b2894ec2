"""Step schedulers of any kind: of torch, of timm (``step(epoch)``), and of pytorch-warmup (``dampening``)."""

from __future__ import annotations

import inspect
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from trackopt.errors import UsageError
from trackopt.training.param_groups import numeric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Metric = Sequence[float] | Callable[[int], float]

_POSITIONS = {"epoch", "num_updates", "updates", "num_steps", "global_step", "current_step", "iteration", "step", "t"}
_METRICS = {"metric", "metrics", "val_loss", "loss"}
_MAX_POSITION = 100_000
_MAX_AMBIGUITY = 1000  # positions after the first that fits

logger = logging.getLogger("trackopt")


def make_stepper(schedulers: Sequence[Any], steps: range, metric: Metric | None) -> Callable[[int], None]:
    """Return a function that steps the schedulers of one optimizer after a step of it, given the step's number.

    Args:
        schedulers: In the order in which they are stepped; those of pytorch-warmup dampen the others.
        steps: The numbers with which the function is called, and a last one with which it is not.
        metric: The metric of a schedule that needs one: the value after each step, or a function of the step.

    Raises:
        UsageError: A metric is missing or too short.
    """
    warmups = [scheduler for scheduler in schedulers if hasattr(scheduler, "dampening")]
    steppers = [_make_stepper(each, steps, metric) for each in schedulers if not hasattr(each, "dampening")]

    def step_all(number: int) -> None:
        with ExitStack() as stack:
            for warmup in warmups:
                stack.enter_context(warmup.dampening())
            for stepper in steppers:
                stepper(number)

    return step_all


def _make_stepper(scheduler: Any, steps: range, metric: Metric | None) -> Callable[[int], None]:
    method = _step_method(scheduler)
    parameters = _parameters(method)
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    optional = [name for name in parameters if name in _METRICS and name not in required and metric is not None]
    needs_metric = _plateau(scheduler) is not None or any(name not in _POSITIONS for name in required)
    values = _metric_values(type(scheduler).__name__, steps, metric) if needs_metric or optional else None

    def step(number: int) -> None:
        value = next(values) if values else None
        method(*(number if name in _POSITIONS else value for name in required), **dict.fromkeys(optional, value))

    return step


def _step_method(scheduler: Any) -> Callable[..., Any]:
    """Return ``step``, or timm's ``step_update`` if the scheduler counts updates and not epochs."""
    counts_updates = not hasattr(scheduler, "step") or not getattr(scheduler, "t_in_epochs", True)
    method: Callable[..., Any] = scheduler.step_update if counts_updates else scheduler.step
    return method


def _parameters(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(method).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}


def _plateau(scheduler: Any) -> ReduceLROnPlateau | None:
    """Return the ReduceLROnPlateau that a scheduler is or holds."""
    candidates = (scheduler, *getattr(scheduler, "__dict__", {}).values())
    return next((each for each in candidates if isinstance(each, ReduceLROnPlateau)), None)


def _metric_values(name: str, steps: range, metric: Metric | None) -> Iterator[float]:
    if metric is None:
        raise UsageError(f"{name}: needs a metric; pass metric=, the values after each step or a function of the step")
    if callable(metric):
        return (float(metric(step)) for step in steps)
    if not hasattr(metric, "__len__"):
        raise UsageError(f"{name}: metric must be the values after each step or a function of the step, not {metric!r}")
    if len(metric) < len(steps) - 1:
        raise UsageError(
            f"{name}: the metric has {len(metric)} values, enough for {len(metric) + 1} steps; pass more values"
        )
    return map(float, metric)


def count_steps(scheduler: Any) -> int | None:
    """Return how often a scheduler was stepped; ``None`` if it receives its position at each step, as timm's are."""
    for key in ("last_epoch", "last_step", "step_t"):
        if (count := getattr(scheduler, key, None)) is not None:
            return max(0, int(count))
    if inner := getattr(scheduler, "_schedulers", None):  # ChainedScheduler leaves the counting to its parts
        return count_steps(inner[0])
    if (plateau := _plateau(scheduler)) is not None and plateau.last_epoch:  # timm's, which warms up first
        return int(plateau.last_epoch) + int(getattr(scheduler, "warmup_t", 0))
    return None if not hasattr(scheduler, "dampening") and _takes_position(scheduler) else 0


def find_position(scheduler: Any, copy: Any) -> int:
    """Return the first position at which a scheduler that does not count sets what its optimizer has.

    Args:
        scheduler: The scheduler.
        copy: A copy of it on an optimizer of its own, which is changed.

    Raises:
        UsageError: There is no such position.
    """
    name = type(scheduler).__name__
    has_plateau = _plateau(scheduler) is not None
    stepper = _make_stepper(copy, range(2 * _MAX_POSITION), (lambda _: 0.0) if has_plateau else None)
    groups = scheduler.optimizer.param_groups
    values = _group_values(scheduler.optimizer)

    def matches(position: int) -> bool:
        stepper(position)
        return _group_values(copy.optimizer) == values

    found = next(filter(matches, range(_MAX_POSITION)), None)
    if found is None and all(group.get("lr") == group.get("initial_lr") for group in groups):
        return 0  # some begin with another LR than they set at position 0
    if found is None:
        raise UsageError(
            f"preview(): {name} does not count its steps, and sets the present LR at none of the first "
            f"{_MAX_POSITION:,}; pass a function that builds it"
        )
    if (other := next(filter(matches, range(found + 1, found + _MAX_AMBIGUITY)), None)) is not None:
        logger.warning(
            "trackopt: preview(): %s does not count its steps, and the present LR fits step %d as well as %d; the "
            "preview begins at %d",
            *(name, found + 1, other + 1, found + 1),
        )
    return found


def _takes_position(scheduler: Any) -> bool:
    return any(
        name in _POSITIONS and parameter.default is parameter.empty
        for name, parameter in _parameters(_step_method(scheduler)).items()
    )


def _group_values(optimizer: Any) -> list[Any]:
    return [(group.get("lr"), numeric(group)) for group in optimizer.param_groups]
