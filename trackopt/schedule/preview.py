"""``trackopt.preview``: compute the LRs of a schedule without training and without touching live objects."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trackopt.errors import UsageError
from trackopt.training.param_groups import label, numeric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.optim import Optimizer

MOMENTUM = 0.9  # of the dummy optimizer; schedules that cycle momentum need one


@dataclass(frozen=True)
class Preview:
    """The LR and other hyperparameters of each step.

    Attributes:
        steps: The step numbers; training starts with step 1.
        lr: The LRs of all steps for each parameter group, by name (``group0``).
        hyper: The same for every other hyperparameter that changes, by names like ``group0.momentum``.
    """

    steps: range
    lr: dict[str, list[float]]
    hyper: dict[str, list[float]]

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Return the points ``(step, value)`` under their names in a journal: ``lr/group0``."""
        named = {f"lr/{name}": values for name, values in self.lr.items()}
        named |= {f"hyper/{name}": values for name, values in self.hyper.items()}
        return {name: list(zip(self.steps, values, strict=True)) for name, values in named.items()}


def preview(
    scheduler: Any,
    steps: int,
    *,
    lr: float | Sequence[float] = 0.1,
    optimizer: Optimizer | None = None,
    metric: Sequence[float] | Callable[[int], float] | None = None,
) -> Preview:
    """Compute the LR over steps, and the momentum if the schedule changes it, without training.

    Live objects are not touched. A step is an optimizer step followed by ``scheduler.step()``; for a scheduler that is
    stepped once per epoch, read "epoch" for "step".

    Args:
        scheduler: A function that builds a scheduler on the optimizer that it receives; or a live scheduler, of which
            a copy continues from its current state.
        steps: The number of steps.
        lr: For a function: the LR of its optimizer (SGD with momentum 0.9), or a list with one LR per group.
        optimizer: For a function: an optimizer whose class and groups to copy, instead of ``lr``.
        metric: The metric of ReduceLROnPlateau: the value after each step, or a function of the step.

    Raises:
        UsageError: ``steps`` is less than 1, ``lr`` is invalid, a metric is missing or too short, or the scheduler
            cannot be copied or has no ``step()``.

    Example:
        >>> import torch, trackopt
        >>> trackopt.preview(lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5), 5, lr=0.4).lr
        {'group0': [0.4, 0.4, 0.2, 0.2, 0.1]}
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"preview(): steps must be an integer >= 1, not {steps!r}")
    with warnings.catch_warnings():
        # torch warns of a scheduler that is stepped without its optimizer, and of its own nested schedulers.
        warnings.simplefilter("ignore", UserWarning)
        if isinstance(scheduler, type) or not hasattr(scheduler, "step"):
            built = _build(scheduler, dummy_optimizer(lr) if optimizer is None else _clone(optimizer, optimizer))
        else:
            built = _clone(scheduler, _get_optimizer(scheduler))
        return _simulate(built, steps, metric)


def dummy_optimizer(lr: float | Sequence[float]) -> Optimizer:
    """Build an optimizer without parameters to optimize: one group for each LR."""
    rates: list[Any] = list(lr) if isinstance(lr, Iterable) else [lr]
    if not rates or not all(isinstance(rate, Real) and 0.0 <= float(rate) < math.inf for rate in rates):
        raise UsageError(f"preview(): lr must be a number >= 0, or one for each parameter group, not {lr!r}")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(0))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=rates[0], momentum=MOMENTUM)


def _build(factory: Any, optimizer: Optimizer) -> Any:
    if not callable(factory):
        raise UsageError(f"preview(): {factory!r} is neither a scheduler nor a function that builds one")
    scheduler = factory(optimizer)
    if _get_optimizer(scheduler) is not optimizer:
        raise UsageError("preview(): the factory must build its scheduler on the optimizer that it receives")
    return scheduler


def _get_optimizer(scheduler: Any) -> Any:
    optimizer = getattr(scheduler, "optimizer", None)
    if not callable(getattr(scheduler, "step", None)) or not hasattr(optimizer, "param_groups"):
        raise UsageError(
            f"preview(): {type(scheduler).__name__} has no step() or no optimizer; pass a scheduler of torch, or a "
            "function that builds one on the optimizer that it receives"
        )
    return optimizer


def _clone(original: Any, optimizer: Optimizer) -> Any:
    """Deep-copy a scheduler or an optimizer without its large parts: parameters and the optimizer's state."""
    memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}
    for group in optimizer.param_groups:
        memo |= {id(parameter): torch.nn.Parameter(torch.zeros(0)) for parameter in group["params"]}
    try:
        return copy.deepcopy(original, memo)
    except (TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        name = type(original).__name__
        raise UsageError(f"preview(): {name} cannot be copied ({error}); pass a function that builds it") from error


def _simulate(scheduler: Any, steps: int, metric: Sequence[float] | Callable[[int], float] | None) -> Preview:
    first = _steps_taken(scheduler) + 1
    values = _metric_arguments(scheduler, range(first, first + steps), metric)
    lr: dict[str, list[float]] = {}
    hyper: dict[str, list[float]] = {}
    for left in reversed(range(steps)):
        for index, group in enumerate(scheduler.optimizer.param_groups):
            name = label(index, group)
            lr.setdefault(name, []).append(float(group["lr"]))
            for key, value in numeric(group).items():
                hyper.setdefault(f"{name}.{key}", []).append(value)
        if left:
            scheduler.step(*next(values))
    changed = {name: series for name, series in hyper.items() if min(series) != max(series)}
    return Preview(range(first, first + steps), lr, changed)


def _steps_taken(scheduler: Any) -> int:
    """Return how often a scheduler was stepped; ChainedScheduler leaves the counting to its parts."""
    inner = getattr(scheduler, "_schedulers", None)
    count = getattr(scheduler, "last_epoch", None)
    if count is None and inner:
        return _steps_taken(inner[0])
    return max(0, int(count or 0))


def _metric_arguments(
    scheduler: Any, steps: range, metric: Sequence[float] | Callable[[int], float] | None
) -> Iterator[tuple[float, ...]]:
    """Yield the arguments of each call of ``scheduler.step``."""
    needs_metric = isinstance(scheduler, ReduceLROnPlateau) or any(
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        for parameter in inspect.signature(scheduler.step).parameters.values()
    )
    name = type(scheduler).__name__
    if not needs_metric:
        return iter(lambda: (), None)
    if metric is None:
        raise UsageError(f"{name}: needs a metric; pass metric=, the values after each step or a function of the step")
    if callable(metric):
        return ((float(metric(step)),) for step in steps)
    if not hasattr(metric, "__len__"):
        raise UsageError(f"{name}: metric must be the values after each step or a function of the step, not {metric!r}")
    if len(metric) < len(steps) - 1:
        raise UsageError(
            f"{name}: the metric has {len(metric)} values, enough for {len(metric) + 1} steps; pass more values"
        )
    return ((float(value),) for value in metric)
