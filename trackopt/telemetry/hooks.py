"""Two step hooks on a live optimizer that read the hyperparameters and the metrics of each step."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer

from trackopt.telemetry.async_scalars import ReadyMetrics, to_step_metrics
from trackopt.telemetry.backward_steps import BackwardSteps
from trackopt.telemetry.error_boundary import ErrorBoundary
from trackopt.telemetry.hyperparameters import Hyperparameters
from trackopt.telemetry.metrics import OptimizerMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from trackopt.journal import Histogram
    from trackopt.telemetry.async_scalars import StepMetrics
    from trackopt.telemetry.metrics import NonFinite
    from trackopt.telemetry.options import StatsOptions
    from trackopt.utils.types import StateDict

T = TypeVar("T")
# Every `step` of every optimizer runs inside this function: it identifies nested calls.
_STEP = Optimizer.profile_hook_step(lambda *_: None).__code__
_DETECTION = "detection of steps in the backward pass"
_UPDATE_EVERY = 10  # steps with statistics: the update costs a copy of the parameters


class OptimizerObserver:
    """Observes one optimizer, and keeps the metrics of its latest step until they are popped.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; it is neither replaced nor patched.
        options: What is measured, and how often.
        prefix: Put before the names of the groups (``"gen."`` where there are several optimizers).
        names: Returns the names of the parameters of each group, in order.
        before_first: Called before the very first step of the optimizer.
        before_another: Called before a step when the metrics of the one before are not popped yet.
        boundary: Makes the calls that read the optimizer.

    Attributes:
        steps: Completed steps, without those that a ``GradScaler`` skipped.
        closure_calls: Calls of the closures that ``step`` was given.
        is_called: True once ``step`` was called.
        has_metrics: True after a step until its metrics are popped.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: StatsOptions,
        *,
        prefix: str = "",
        names: Callable[[], Sequence[Sequence[str]]],
        before_first: Callable[[], None] = lambda: None,
        before_another: Callable[[], None] = lambda: None,
        boundary: ErrorBoundary | None = None,
    ):
        self.optimizer = optimizer
        self.steps = self.closure_calls = 0
        self.is_called = self.has_metrics = False
        self._before_first = before_first
        self._before_another = before_another
        self._overflowed = False
        self._every = options.stats_every if options.stats else 0
        self._histograms_every = options.histograms_every
        self._boundary = boundary or ErrorBoundary()
        self._hyperparameters = Hyperparameters(optimizer, prefix)
        self._boundary.call("hyperparameters", self._hyperparameters.remember)
        self._optimizer_metrics = OptimizerMetrics(
            optimizer, prefix, names, self._boundary, per_parameter=options.stats == "param"
        )
        self._depth = 0
        self._hyperparameters_used: dict[str, float | Tensor] = {}
        self._metrics: StepMetrics = ReadyMetrics({})
        self._histograms: dict[str, Histogram] = {}
        self._backward_steps = BackwardSteps(optimizer, self._begin_step)
        self._handles = [
            optimizer.register_step_pre_hook(_untraced(self._before)),
            optimizer.register_step_post_hook(_untraced(self._after)),
        ]

    @property
    def watches_backward(self) -> bool:
        """True if gradients or iterations are watched for steps in the backward pass."""
        return self._backward_steps.is_active

    def begin_iteration(self) -> None:
        """Prepare to detect a step without a call of ``step``; not needed once a step was seen."""
        self._boundary.call(_DETECTION, self._backward_steps.snapshot)

    def end_iteration(self, *, detect: bool) -> None:
        """Count a step of an optimizer that updates its parameters within the backward pass.

        Args:
            detect: No step was seen in the run so far, and ``begin_iteration`` was called.
        """
        steps = self._backward_steps
        if (detect or steps.is_active) and self._boundary.call(_DETECTION, steps.pop_step, detect=detect):
            lr = getattr(self.optimizer, "lr", None)
            if isinstance(lr, (int, float)):  # LOMO's, an argument of fused_backward; the groups keep the first one
                used = self._hyperparameters_used
                self._hyperparameters_used = {key: lr if key.startswith("lr/") else used[key] for key in used}
            self._end_step()

    def report_missing_step(self) -> None:
        """Warn once if there were gradients and no step."""
        self._backward_steps.report_missing_step()

    def pop_metrics(self) -> StepMetrics:
        """Remove and return the metrics of the latest step since the last call; empty without a step."""
        metrics, self._metrics = self._metrics, ReadyMetrics({})
        self.has_metrics = False
        return metrics

    def pop_histograms(self) -> dict[str, Histogram]:
        """Remove and return the histograms of the latest step since the last call, by ``exp_avg/group0``."""
        if not self._histograms:
            return {}
        histograms, self._histograms = self._histograms, {}
        return histograms

    def element_counts(self) -> dict[str, int]:
        """Return the number of elements of the parameters and of each buffer in each unit, by name."""
        return self._optimizer_metrics.element_counts()

    def pop_nonfinite(self) -> list[NonFinite]:
        """Remove and return the tensors that have become NaN or infinite in the metrics since the last call."""
        return self._optimizer_metrics.pop_nonfinite()

    def pop_overflow(self) -> bool:
        """Return whether a step was skipped because of an overflow since the last call."""
        overflowed, self._overflowed = self._overflowed, False
        return overflowed

    def close(self) -> None:
        """Remove the hooks."""
        self._backward_steps.close()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> StateDict:
        """Return the state from which a resumed run continues to observe as if it had never stopped."""
        seen = self._hyperparameters.seen
        state = {"steps": self.steps, "evaluations": self.closure_calls, "hyperparameters": seen}
        return {**state, "in_backward": True} if self._backward_steps.is_followed else state

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what ``state_dict`` returned."""
        self.steps, self.closure_calls = state["steps"], state["evaluations"]
        self.pop_metrics()
        self._hyperparameters.seen = state["hyperparameters"]
        if state.get("in_backward"):
            self._backward_steps.follow()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Read the hyperparameters that the step will use: schedulers change them later."""
        self._depth += 1
        if self._depth > 1:  # a step within a step, or the last step raised
            if _is_nested(optimizer):
                return None
            self._depth = 1
        self.is_called = True
        self._begin_step()
        if len(args) == 1 and not kwargs:
            return None
        return self._boundary.call("count of closure calls", self._count_closure_calls, args, kwargs)

    def _begin_step(self) -> None:
        if not self.steps:
            self._before_first()
        if self.has_metrics:
            self._before_another()
        self._hyperparameters_used = self._boundary.call("hyperparameters", self._hyperparameters.read) or {}
        if self._every and self.steps % (self._every * _UPDATE_EVERY) == 0:
            self._optimizer_metrics.snapshot_parameters()

    def _count_closure_calls(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the step's arguments with a closure that counts its calls; ``None`` without a closure."""
        own, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if not callable(closure):  # a step of the user's own may take another argument
            return None

        @functools.wraps(closure)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.closure_calls += 1
            return closure(*args, **kwargs)

        return ((own, counted, *rest[1:]), kwargs) if rest else (args, {**kwargs, "closure": counted})

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - torch's signature
        self._depth -= 1
        if self._depth and _is_nested(optimizer):
            return
        self._depth = 0
        if hasattr(optimizer, "found_inf") and self._boundary.call("overflow check", _was_skipped, optimizer):
            self._overflowed = True
            self._optimizer_metrics.discard_snapshot()
            return
        if self._backward_steps.is_active:
            self._backward_steps.stop()
        self._end_step()

    def _end_step(self) -> None:
        self.steps += 1
        self.has_metrics = True
        if self._every and (self.steps - 1) % self._every == 0:
            self._metrics = self._optimizer_metrics.compute(self._hyperparameters_used)
        else:
            self._metrics = to_step_metrics(self._hyperparameters_used, self._boundary)
        if self._histograms_every and (self.steps - 1) % self._histograms_every == 0:
            self._histograms = self._boundary.call("histograms", self._optimizer_metrics.histograms) or {}


def _untraced(hook: T) -> T:
    """Return a hook that Dynamo does not trace in a compiled step: it reads Python state that changes at every step."""
    if _is_skipped_by_dynamo():
        return hook
    disabled: Callable[[T], T] = torch.compiler.disable  # costs time at every call
    return disabled(hook)


@functools.cache
def _is_skipped_by_dynamo() -> bool:
    """Ask Dynamo to trace nothing of this package; return whether it knows how."""
    try:
        from torch._dynamo import trace_rules

        trace_rules.add("trackopt")
    except Exception:  # noqa: BLE001 - the function is not public
        return False
    return True


def _is_nested(optimizer: Optimizer) -> bool:
    """Return whether this step runs within a step of the same optimizer: ``super().step()`` fires the hooks too."""
    depth, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            depth += 1
        frame = frame.f_back
    return depth > 1


def _was_skipped(optimizer: Optimizer) -> bool:
    """Return whether the step changed nothing: under a GradScaler, fused optimizers run hooks after an overflow too."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())
