"""Turn the steps and metrics of each iteration into one line of the journal."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trackopt.telemetry.accumulator import MetricAccumulator, single_rank_gather
from trackopt.telemetry.async_scalars import to_step_metrics
from trackopt.telemetry.clipping import Clipping
from trackopt.telemetry.error_boundary import ErrorBoundary
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.metrics import NonFinite
from trackopt.telemetry.per_parameter import PerParameterOptimizers
from trackopt.telemetry.scheduler_order import SchedulerOrderCheck
from trackopt.telemetry.step_counts import StepCounts
from trackopt.utils.text import describe_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from trackopt.journal import Histogram, Journal
    from trackopt.telemetry.accumulator import Gather
    from trackopt.telemetry.async_scalars import StepMetrics
    from trackopt.telemetry.options import StatsOptions
    from trackopt.training.objects import Training
    from trackopt.utils.types import StateDict

_WARN_AFTER_STEPS = 100  # steps in a row without the end of an iteration

logger = logging.getLogger("trackopt")


def _names(training: Training, optimizer: str) -> list[list[str]]:
    return training.parameter_names()[optimizer]


@dataclass(slots=True)
class _Step:
    """A step whose numbers may still be in transfer from a device."""

    number: int
    time: float
    logged: StepMetrics
    observed: list[tuple[StepMetrics, dict[str, Histogram]]]  # of each optimizer

    @property
    def is_ready(self) -> bool:
        return self.logged.is_ready and all(metrics.is_ready for metrics, _ in self.observed)


class MetricsCollector:
    """Records the metrics of a training's optimizers and those that the user logs, step by step.

    Args:
        training: Its optimizers and schedulers are observed.
        journal: Receives the records.
        options: What is measured, and how often.
        gather: As in `MetricAccumulator`.

    Attributes:
        recorded: The step of the latest record, whose numbers may still be in transfer.
        ends_iterations: True once the loop has ended an iteration by ``run.step``.
        latest: The metrics of the latest record in the journal.
        clipping: Is told of gradients that were clipped.
        boundary: Makes the calls that must not stop the training; those that read an optimizer have one of their own.
    """

    def __init__(
        self, training: Training, journal: Journal, options: StatsOptions, gather: Gather = single_rank_gather
    ) -> None:
        self.recorded = 0
        self.ends_iterations = False
        self.latest: Mapping[str, float] = {}
        self._journal = journal
        self._accumulator = MetricAccumulator(gather)
        self._trailing = MetricAccumulator()  # what was logged after a step that ``run.step`` has ended
        self.clipping = Clipping()
        self._thread = threading.get_ident()  # the one that trains
        self._in_flight: deque[_Step] = deque()
        self._observers: dict[str, OptimizerObserver] = {}
        self.boundary = ErrorBoundary(self._report_failure)
        self._scheduler_check = SchedulerOrderCheck(training.schedulers, training.stateful.values(), self.boundary)
        optimizers = training.optimizers
        for name, optimizer in optimizers.items():
            self._observers[name] = OptimizerObserver(
                optimizer,
                options,
                prefix=f"{name}." if len(optimizers) > 1 else "",
                names=partial(_names, training, name),
                before_first=self._scheduler_check.before_first_step,
                before_another=self._before_another_step,
                boundary=ErrorBoundary(partial(self._report_failure, optimizer=(name, type(optimizer).__name__))),
            )
        self._per_parameter = PerParameterOptimizers({} if options.stats == "param" else optimizers)
        self._in_iteration = False
        self._unended_steps = 0  # recorded since the latest end of an iteration
        self._logged_at: dict[str, int] = {}  # in an iteration without an end: the completed steps, by key
        self._has_stepped_before = False
        self._nonfinite_losses: set[str] = set()
        self._renamed: set[str] = set()  # logged keys that are series of ours
        self._prepare_detection()

    @property
    def step(self) -> int:
        """Completed optimizer steps.

        Several optimizers that step in one iteration make one step of the run: the largest of their numbers. Where they
        take turns by iteration, each iteration is a step.
        """
        latest, is_stepping = 0, False
        for observer in self._observers.values():
            latest = max(latest, observer.steps)
            is_stepping = is_stepping or observer.has_metrics
        return max(latest, self.recorded + is_stepping)

    @property
    def skipped(self) -> int:
        """Iterations whose step a ``GradScaler`` skipped."""
        return self._scheduler_check.skipped

    @property
    def step_counts(self) -> StepCounts:
        """The iterations and steps so far, by kind."""
        observers = self._observers.values()
        return StepCounts(
            iterations=self._scheduler_check.iterations,
            steps=sum(observer.steps for observer in observers),
            skipped=self.skipped,
            closure_calls=sum(observer.closure_calls for observer in observers),
        )

    def log(self, metrics: Mapping[str, Any], *, reduced: bool = False, is_trailing: bool = False) -> None:
        """Add metrics of the user; any thread may.

        Args:
            metrics: The numbers.
            reduced: Record their mean over all ranks.
            is_trailing: They belong to the latest record, and not to the step that follows.

        Raises:
            UsageError: A value is not a number.
        """
        if is_trailing and self.recorded:
            self._trailing.add(metrics)
            return
        if self._ends_by_itself and len(self._observers) == 1 and threading.get_ident() == self._thread:
            if any(self._logged_at.get(key, self.step) < self.step for key in metrics):
                self._record_unended_step()
            self._logged_at |= dict.fromkeys(metrics, self.step)
        self._accumulator.add(metrics, reduced=reduced)

    def begin_iteration(self) -> None:
        """Remember the positions of the schedulers."""
        self._in_iteration = True
        self._scheduler_check.begin_iteration()
        self._prepare_detection()

    def end_iteration(self) -> bool:
        """Record the iteration's step as soon as its numbers have arrived; return whether a step was taken."""
        check = self._scheduler_check
        detect = not (self._has_stepped_before or self._has_stepped or check.is_scaler_updated())
        overflowed = False
        for observer in self._observers.values():
            if detect or observer.watches_backward:
                observer.end_iteration(detect=detect)
            overflowed = observer.pop_overflow() or overflowed
        step = self.step
        stepped = step > self.recorded
        check.end_iteration(stepped=stepped, overflowed=overflowed)
        if check.messages:
            for message in check.pop_messages():
                logger.warning("trackopt: %s", message)
        if stepped:
            self._record_step(step)
        while self._in_flight and self._in_flight[0].is_ready:
            self._record(self._in_flight.popleft())
        if not self._has_stepped_before:
            self._prepare_detection()
        self._in_iteration, self._unended_steps = False, 0
        return stepped

    def pop_unended_steps(self) -> int:
        """Return how many steps were recorded, though their iteration has not ended, and count from 0 again.

        Returns:
            0 also if there were so many that a warning has been logged.
        """
        steps, self._unended_steps = self._unended_steps, 0
        return steps if steps < _WARN_AFTER_STEPS else 0

    @property
    def _ends_by_itself(self) -> bool:
        """True where neither ``run.batches`` nor ``run.step`` says when an iteration ends."""
        return not self._in_iteration and not self.ends_iterations

    def _before_another_step(self) -> None:
        """Record the step before, in a loop that does not say when an iteration ends."""
        if self._ends_by_itself and self.step > self.recorded:
            self._record_unended_step()

    def _record_unended_step(self) -> None:
        self._record_step(self.step)
        self._unended_steps += 1
        if self._unended_steps == _WARN_AFTER_STEPS:
            logger.warning(
                "trackopt: %d steps, but no iteration has ended, so no checkpoint can be taken: take the batches from "
                "run.batches(loader), or call run.step() at the end of each iteration",
                self._unended_steps,
            )

    def _record_step(self, step: int) -> None:
        """Put the latest step, with what was logged, in line for the journal."""
        self._record_late()
        self.recorded = step
        self._logged_at.clear()
        observers = self._observers.values()
        observed = [(observer.pop_metrics(), observer.pop_histograms()) for observer in observers]
        logged = to_step_metrics({**self._accumulator.pop_all(), **self.clipping.pop()}, self.boundary)
        self._in_flight.append(_Step(step, time.time(), logged, observed))

    def flush(self) -> None:
        """Wait for the numbers of all steps, and record them."""
        while self._in_flight:
            self._record(self._in_flight.popleft())

    def record_trailing(self, *, all_ranks: bool = True, at_start: bool = False) -> None:
        """Record metrics that were logged after the last step, as a second line of that step.

        Args:
            all_ranks: All ranks make this call; if not, metrics that are reduced over ranks wait.
            at_start: Before the first step, record them at step 0; if not, they wait for it.
        """
        self._record_late()
        self.flush()
        if (self.recorded or at_start) and (metrics := self._accumulator.pop_unrecorded(all_ranks=all_ranks)):
            self._journal.record(self.recorded, to_step_metrics(metrics, self.boundary).metrics())

    def _record_late(self) -> None:
        """Record what was logged after the latest step as a second line of it."""
        if not self._trailing.is_empty:
            self.flush()
            self._trailing.recorded = self._accumulator.recorded
            late = self._trailing.pop_unrecorded()
            self._accumulator.recorded |= late.keys()
            self._accumulator.add(self._trailing.pop_all())
            if late:
                self._journal.record(self.recorded, to_step_metrics(late, self.boundary).metrics())

    def _record(self, step: _Step) -> None:
        metrics = step.logged.metrics()
        if self._nonfinite_losses or not math.isfinite(sum(metrics.values())):
            self._report_nonfinite(step, self._new_nonfinite_losses(metrics))
        logged = dict(metrics)
        own: list[Mapping[str, float]] = []
        units, by_optimizer = self._per_parameter.units, {}
        for (name, observer), (observed, histograms) in zip(self._observers.items(), step.observed, strict=True):
            if name in units:
                by_optimizer[name] = observed.metrics()
            else:
                own.append(observed.metrics())
            if nonfinite := observer.pop_nonfinite():
                self._report_nonfinite(step, nonfinite)
            if histograms:
                self._journal.histograms(step.number, histograms)
        if by_optimizer:
            sizes = {name: self._observers[name].element_counts() for name in by_optimizer}
            own.append(self.boundary.call("merge of optimizers", self._per_parameter.merge, by_optimizer, sizes) or {})
        for part in own:
            metrics |= part
        if len(metrics) < len(logged) + sum(map(len, own)):
            metrics |= self._rename_logged(logged, own)
        self._journal.record(step.number, metrics, step.time)
        self._accumulator.recorded = metrics.keys()
        self.latest = metrics

    def _rename_logged(self, logged: Mapping[str, float], own: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return what the user logged under names of trackopt's series, under other names."""
        values = {key: value for key, value in logged.items() if any(key in part for part in own)}
        for key in values.keys() - self._renamed:
            logger.warning("trackopt: %s is a series of trackopt's; what the script logs is logged/%s", key, key)
        self._renamed |= values.keys()
        return {f"logged/{key}": value for key, value in values.items()}

    def _new_nonfinite_losses(self, metrics: Mapping[str, float]) -> Iterator[NonFinite]:
        """Yield the logged losses that are not finite, and were finite at the step before."""
        losses = {key for key, value in metrics.items() if not math.isfinite(value) and "loss" in key.lower()}
        if new := losses - self._nonfinite_losses:
            yield from map(NonFinite, sorted(new))
        self._nonfinite_losses = losses

    def _report_nonfinite(self, step: _Step, nonfinite: Iterable[NonFinite]) -> None:
        for event in nonfinite:
            details = {} if event.parameter is None else {"parameter": event.parameter}
            self._journal.mark("nonfinite", step.number, what=event.what, **details)
            suffix = f" ({event.parameter})" if details else ""
            logger.warning("trackopt: step %d: NaN or infinity in the %s%s", step.number, event.what, suffix)

    def _report_failure(self, part: str, error: Exception, optimizer: tuple[str, str] | None = None) -> None:
        """Log a part that failed, and mark it in the journal.

        Args:
            part: What failed.
            error: Its error.
            optimizer: Name and class of the optimizer that was read.
        """
        reason, details, of = describe_error(error), {}, ""
        if optimizer is not None:
            details = {"optimizer": optimizer[0], "optimizer_class": optimizer[1]}
            of = f" of {optimizer[1]}" if len(self._observers) == 1 else f" of {optimizer[0]} ({optimizer[1]})"
        self._journal.mark("measurement_failed", self.step, part=part, error=reason, **details)
        logger.warning(
            "trackopt: step %d: %s%s failed (%s); training continues without it", self.step, part, of, reason
        )

    def state_dict(self) -> StateDict:
        """Return the state from which a resumed run continues to record as if it had never stopped.

        Call ``flush`` first: the journal must hold all earlier records.
        """
        self._record_late()
        observers = {name: observer.state_dict() for name, observer in self._observers.items()}
        for name, unit in self._per_parameter.units.items():
            observers[name]["unit"] = unit
        clipping = self.clipping.state_dict()
        return {
            **({"clipping": clipping} if clipping else {}),
            "observers": observers,
            "pending": self._accumulator.state_dict(),
            "turns": self._scheduler_check.state_dict() | {"explicit": self.ends_iterations, "step": self.step},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, observer in self._observers.items():
            observer.load_state_dict(state["observers"][name])
        saved = state["observers"].items()
        self._per_parameter.units = {name: observer["unit"] for name, observer in saved if "unit" in observer}
        self.load_pending(state)
        self.clipping.load_state_dict(state.get("clipping", {}))
        self._scheduler_check.load_state_dict(state["turns"])
        self.ends_iterations = state["turns"].get("explicit", False)
        self.recorded = 0
        self.recorded = state["turns"].get("step", self.step)

    def load_pending(self, state: Mapping[str, Any]) -> None:
        """Restore only the metrics that were logged and not recorded, and drop the current ones."""
        self._accumulator.load_state_dict(state["pending"])

    def set_step(self, step: int) -> None:
        """Continue to count from a step if nothing else is known."""
        for observer in self._observers.values():
            observer.steps = step
        self.recorded = step

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for observer in self._observers.values():
            if not self._has_stepped:
                observer.report_missing_step()
            observer.close()

    @property
    def _has_stepped(self) -> bool:
        """True if any optimizer was stepped in the run, by ``step`` or in the backward pass."""
        if not self._has_stepped_before:
            observers = self._observers.values()
            self._has_stepped_before = any(observer.steps or observer.is_called for observer in observers)
        return self._has_stepped_before

    def _prepare_detection(self) -> None:
        if not self._has_stepped:
            for observer in self._observers.values():
                observer.begin_iteration()
