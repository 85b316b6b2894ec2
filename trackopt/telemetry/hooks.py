"""The observer: two step hooks on a live optimizer that write down what each step used and left behind."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer

from trackopt.telemetry.async_scalars import AsyncMetrics
from trackopt.telemetry.hyperparameters import Hyperparameters
from trackopt.telemetry.metrics import OptimizerMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from trackopt.telemetry.metrics import NonFinite

T = TypeVar("T")
# Every `step` of every optimizer runs inside this one function: it is how a nested call is recognised.
_STEP = Optimizer.profile_hook_step(lambda *_: None).__code__
_UPDATE_EVERY = 10  # steps with statistics: the update costs a copy of the parameters


class OptimizerObserver:
    """Watches one optimizer. What the latest step did waits in it until ``take`` asks for it.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; it is neither replaced nor patched.
        prefix: Put before the names of the groups (``"gen."`` where there are several optimizers).
        stats: ``"group"`` for statistics of the parameters, gradients and buffers of each parameter group,
            ``"param"`` for those of each parameter, ``None`` for none.
        stats_every: Take them at steps 1, 1 + n, 1 + 2n, …; the true update at every tenth of these.
        histograms_every: Take histograms at steps 1, 1 + n, 1 + 2n, …; 0 for none.
        names: Returns the names of the parameters of each group, in order.
        before_first: Called when the optimizer is about to take its very first step.

    Attributes:
        steps: Completed steps. One that a ``GradScaler`` skipped is none.
        evaluations: Calls of the closures that ``step`` was given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        prefix: str = "",
        stats: str | None = "group",
        stats_every: int = 1,
        histograms_every: int = 0,
        names: Callable[[], Sequence[Sequence[str]]],
        before_first: Callable[[], None] = lambda: None,
    ):
        self.optimizer = optimizer
        self.steps = self.evaluations = 0
        self._before_first = before_first
        self._overflowed = False
        self._every = stats_every if stats else 0
        self._histograms_every = histograms_every
        self._hyperparameters = Hyperparameters(optimizer, prefix)
        self._meter = OptimizerMetrics(optimizer, prefix, names, per_parameter=stats == "param")
        self._depth = 0
        self._hyperparameters_used: dict[str, float | Tensor] = {}
        self._metrics = AsyncMetrics({})
        self._histograms: dict[str, Any] = {}
        untraced: Callable[[T], T] = torch.compiler.disable
        # Dynamo must not trace the hooks of a compiled step: they read Python state that changes at every step.
        self._handles = [
            optimizer.register_step_pre_hook(untraced(self._before)),
            optimizer.register_step_post_hook(untraced(self._after)),
        ]

    def pop_metrics(self) -> AsyncMetrics:
        """The metrics of the latest step since the last call; none when there was none."""
        latest, self._metrics = self._metrics, AsyncMetrics({})
        return latest

    def pop_histograms(self) -> dict[str, Any]:
        """The histograms of the latest step since the last call, by ``exp_avg/group0``; mostly empty."""
        histograms, self._histograms = self._histograms, {}
        return histograms

    def pop_nonfinite(self) -> list[NonFinite]:
        """What was not finite in the readings that arrived since the last call, and had been before."""
        return self._meter.pop_nonfinite()

    def pop_overflow(self) -> bool:
        """Whether a step was skipped because of an overflow since the last call."""
        overflowed, self._overflowed = self._overflowed, False
        return overflowed

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on observing as if it had never stopped."""
        seen = self._hyperparameters.seen
        return {"steps": self.steps, "evaluations": self.evaluations, "hyperparameters": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.steps, self.evaluations = state["steps"], state["evaluations"]
        self._hyperparameters.seen = state["hyperparameters"]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Read the hyperparameters while they are the ones that the step will use: schedulers move them later."""
        self._depth += 1
        if self._depth > 1:  # a step within a step, or the last one raised
            if _is_nested(optimizer):
                return None
            self._depth = 1
        if not self.steps:
            self._before_first()
        self._hyperparameters_used = self._hyperparameters.read()
        if self._every and self.steps % (self._every * _UPDATE_EVERY) == 0:
            self._meter.before()
        return self._count_closure_calls(args, kwargs)

    def _count_closure_calls(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The step's arguments with a closure that counts its calls; ``None`` if there is none to count."""
        own, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if not callable(closure):  # a step of the user's own may take something else there
            return None

        @functools.wraps(closure)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.evaluations += 1
            return closure(*args, **kwargs)

        return ((own, counted, *rest[1:]), kwargs) if rest else (args, {**kwargs, "closure": counted})

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - torch's signature
        self._depth -= 1
        if self._depth and _is_nested(optimizer):
            return
        self._depth = 0
        if _was_skipped(optimizer):
            self._overflowed = True
            self._meter.forget()
            return
        self.steps += 1
        measured = self._every and (self.steps - 1) % self._every == 0
        self._metrics = (
            self._meter.compute(self._hyperparameters_used) if measured else AsyncMetrics(self._hyperparameters_used)
        )
        if self._histograms_every and (self.steps - 1) % self._histograms_every == 0:
            self._histograms = self._meter.histograms()


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether the same optimizer's step called this one: ``super().step()`` in a subclass fires the hooks too."""
    depth, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            depth += 1
        frame = frame.f_back
    return depth > 1


def _was_skipped(optimizer: Optimizer) -> bool:
    """A fused optimizer under a GradScaler runs its hooks even when it found an overflow and changed nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
