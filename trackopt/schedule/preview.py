"""``trackopt.preview``: compute the LRs of a schedule without training and without touching live objects."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from trackopt.errors import UsageError
from trackopt.schedule.stepping import count_steps, find_position, make_stepper
from trackopt.training.param_groups import labels, numeric, to_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from trackopt.schedule.stepping import Metric

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
    metric: Metric | None = None,
) -> Preview:
    """Compute the LR over steps, and the momentum if the schedule changes it, without training.

    Live objects are not touched. A step is an optimizer step followed by ``scheduler.step()``; for a scheduler that is
    stepped once per epoch, read "epoch" for "step". Schedulers that take the epoch or the number of updates, such as
    timm's, receive the number of steps so far.

    Args:
        scheduler: A function that builds a scheduler on the optimizer that it receives; or a live scheduler, of which
            a copy continues from its current state. Either may be a dict of schedulers of one optimizer, which are
            stepped in order, those of pytorch-warmup around the others.
        steps: The number of steps.
        lr: For a function: the LR of its optimizer (SGD with momentum 0.9), or a list with one LR per group.
        optimizer: For a function: an optimizer whose class and groups to copy, instead of ``lr``.
        metric: The metric of ReduceLROnPlateau: the value after each step, or a function of the step. Others that
            accept a metric receive it, too.

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
        schedulers, first = _prepare(scheduler, lr, optimizer)
        return _simulate(schedulers, range(first, first + steps), metric)


def _prepare(scheduler: Any, lr: float | Sequence[float], optimizer: Optimizer | None) -> tuple[list[Any], int]:
    """Return copies of live schedulers, or new ones, and the number of their next step."""
    if _is_live(scheduler):
        original = _get_optimizer(scheduler)
        schedulers = _as_list(_clone(scheduler, original))
        return schedulers, _position(_as_list(scheduler), _as_list(_clone(scheduler, original))) + 1
    schedulers = _as_list(_build(scheduler, dummy_optimizer(lr) if optimizer is None else _clone(optimizer, optimizer)))
    return schedulers, max(count_steps(each) or 0 for each in schedulers) + 1


def dummy_optimizer(lr: float | Sequence[float]) -> Optimizer:
    """Build an optimizer without parameters to optimize: one group for each LR."""
    rates: list[Any] = list(lr) if isinstance(lr, Iterable) else [lr]
    if not rates or not all(isinstance(rate, Real) and 0.0 <= float(rate) < math.inf for rate in rates):
        raise UsageError(f"preview(): lr must be a number >= 0, or one for each parameter group, not {lr!r}")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(0))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=rates[0], momentum=MOMENTUM)


def _as_list(scheduler: Any) -> list[Any]:
    return list(scheduler.values()) if isinstance(scheduler, Mapping) else [scheduler]


def _position(schedulers: Sequence[Any], copies: Sequence[Any]) -> int:
    """Return how often live schedulers were stepped."""
    counts = [count for each in schedulers if (count := count_steps(each)) is not None]
    return max(counts) if counts else find_position(schedulers[0], copies[0])


def _is_live(scheduler: Any) -> bool:
    """Return whether this is a scheduler, or a dict of them, and not a function that builds one."""
    return isinstance(scheduler, Mapping) or (not isinstance(scheduler, type) and _is_scheduler(scheduler))


def _is_scheduler(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("step", "step_update", "dampening"))


def _build(factory: Any, optimizer: Optimizer) -> Any:
    if not callable(factory):
        raise UsageError(f"preview(): {factory!r} is neither a scheduler nor a function that builds one")
    scheduler = factory(optimizer)
    if _get_optimizer(scheduler) is not optimizer:
        raise UsageError("preview(): the factory must build its scheduler on the optimizer that it receives")
    return scheduler


def _get_optimizer(scheduler: Any) -> Any:
    """Return the optimizer of a scheduler, or of a dict of schedulers."""
    schedulers = _as_list(scheduler)
    for each in schedulers:
        if not _is_scheduler(each) or not hasattr(getattr(each, "optimizer", None), "param_groups"):
            raise UsageError(
                f"preview(): {type(each).__name__} has no step() or no optimizer; pass a scheduler, or a function that "
                "builds one on the optimizer that it receives"
            )
    if len({id(each.optimizer) for each in schedulers}) != 1:
        raise UsageError("preview(): the schedulers have several optimizers; pass those of one optimizer at a time")
    return schedulers[0].optimizer


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


def _simulate(schedulers: Sequence[Any], steps: range, metric: Metric | None) -> Preview:
    step_all = make_stepper(schedulers, steps, metric)
    lr: dict[str, list[float]] = {}
    hyper: dict[str, list[float]] = {}
    for step in steps:
        groups = schedulers[0].optimizer.param_groups
        for name, group in zip(labels(groups), groups, strict=True):
            if group.get("lr") is not None:  # Adafactor computes its own LR
                lr.setdefault(name, []).append(to_float(group["lr"]))
            for key, value in numeric(group).items():
                hyper.setdefault(f"{name}.{key}", []).append(value)
        if step != steps[-1]:
            step_all(step)
    changed = {name: series for name, series in hyper.items() if min(series) != max(series)}
    return Preview(steps, lr, changed)
