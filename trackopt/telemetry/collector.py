"""From what happened in an iteration to one line of the journal."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trackopt.telemetry.accumulator import MetricAccumulator, single_rank_gather
from trackopt.telemetry.async_scalars import AsyncMetrics
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.metrics import NonFinite
from trackopt.telemetry.step_counts import SchedulerOrderCheck, StepCounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trackopt.journal import Journal
    from trackopt.telemetry.accumulator import Gather
    from trackopt.training.objects import Training

_WARN_AFTER_STEPS = 100  # steps without the end of an iteration, after which the user is reminded of it

logger = logging.getLogger("trackopt")


def _names(training: Training, optimizer: str) -> list[list[str]]:
    return training.parameter_names()[optimizer]


@dataclass(frozen=True)
class _Step:
    """A step whose numbers may still be on their way from a device."""

    number: int
    time: float
    logged: AsyncMetrics
    observed: dict[OptimizerObserver, tuple[AsyncMetrics, dict[str, Any]]]

    @property
    def arrived(self) -> bool:
        return self.logged.is_ready and all(reading.is_ready for reading, _ in self.observed.values())


class MetricsCollector:
    """Watches the optimizers of a training, takes what the user logs, and records both step by step.

    Args:
        training: Whose optimizers and schedulers to watch.
        journal: Where the records go.
        gather: As `MetricAccumulator` takes it.
        **options: ``stats``, ``stats_every`` and ``histograms_every`` as `OptimizerObserver` takes them.

    Attributes:
        recorded: The step of the latest record, which may still wait for its numbers.
        latest: What the latest record in the journal says.
    """

    def __init__(
        self, training: Training, journal: Journal, gather: Gather = single_rank_gather, **options: Any
    ) -> None:
        self.recorded = 0
        self.latest: Mapping[str, float] = {}
        self._journal = journal
        self._pending = MetricAccumulator(gather)
        self._in_flight: deque[_Step] = deque()
        self._scheduler_check = SchedulerOrderCheck(training.schedulers, training.stateful.values())
        optimizers = training.optimizers
        self._observers = {
            name: OptimizerObserver(
                optimizer,
                prefix=f"{name}." if len(optimizers) > 1 else "",
                names=partial(_names, training, name),
                before_first=self._scheduler_check.before_first_step,
                **options,
            )
            for name, optimizer in optimizers.items()
        }
        self._reminded = False
        self._nonfinite_losses: set[str] = set()

    @property
    def step(self) -> int:
        """Completed optimizer steps; with several optimizers, those of the one that took most."""
        return max(observer.steps for observer in self._observers.values())

    @property
    def ledger(self) -> StepCounts:
        """What kinds of steps there were."""
        observers = self._observers.values()
        return StepCounts(
            iterations=self._scheduler_check.iterations,
            steps=sum(observer.steps for observer in observers),
            skipped=self._scheduler_check.skipped,
            closure_calls=sum(observer.evaluations for observer in observers),
        )

    def log(self, metrics: Mapping[str, Any], *, shared: bool = False) -> None:
        """Take what the user logs; with ``reduced``, the mean of what all ranks do.

        Raises:
            UsageError: A value is not a number.
        """
        self._pending.add(metrics, reduced=shared)
        if not self._reminded and self.step - self.recorded > _WARN_AFTER_STEPS:
            self._reminded = True
            logger.warning(
                "trackopt: %d steps, but no iteration has ended: take the batches from run.batches(loader), or call "
                "run.step() at the end of each iteration",
                self.step,
            )

    def begin_iteration(self) -> None:
        """Take note of where the schedulers stand."""
        self._scheduler_check.begin_iteration()

    def end_iteration(self) -> bool:
        """Record the step that was taken in it, once its numbers have arrived; whether there was one."""
        stepped = self.step > self.recorded
        overflowed = sum(observer.pop_overflow() for observer in self._observers.values()) > 0
        self._scheduler_check.end_iteration(stepped=stepped, overflowed=overflowed)
        for message in self._scheduler_check.messages():
            logger.warning("trackopt: %s", message)
        if stepped:
            self.recorded = self.step
            observed = {
                observer: (observer.pop_metrics(), observer.pop_histograms()) for observer in self._observers.values()
            }
            self._in_flight.append(_Step(self.recorded, time.time(), AsyncMetrics(self._pending.pop_all()), observed))
        while self._in_flight and self._in_flight[0].arrived:
            self._record(self._in_flight.popleft())
        return stepped

    def flush(self) -> None:
        """Wait for the numbers of the steps that are not recorded yet, and record them."""
        while self._in_flight:
            self._record(self._in_flight.popleft())

    def record_trailing(self, *, all_ranks: bool = True) -> None:
        """Record what was logged behind the last step, as a second line of that step; all ranks do it ``all_ranks``."""
        self.flush()
        if self.recorded and (rest := self._pending.pop_unrecorded(together=all_ranks)):
            self._journal.record(self.recorded, AsyncMetrics(rest).metrics())

    def _record(self, step: _Step) -> None:
        metrics = step.logged.metrics()
        self._report_nonfinite(step, self._losses(metrics))
        for observer, (reading, histograms) in step.observed.items():
            metrics |= reading.metrics()
            self._report_nonfinite(step, observer.pop_nonfinite())
            if histograms:
                self._journal.histograms(step.number, histograms)
        self._journal.record(step.number, metrics, step.time)
        self._pending.recorded = set(metrics)
        self.latest = metrics

    def _losses(self, metrics: Mapping[str, float]) -> Iterator[NonFinite]:
        """The logged losses that are not finite, and were at the step before."""
        ailing = {key for key, value in metrics.items() if not math.isfinite(value) and "loss" in key.lower()}
        yield from (NonFinite(key) for key in sorted(ailing - self._nonfinite_losses))
        self._nonfinite_losses = ailing

    def _report_nonfinite(self, step: _Step, news: Iterable[NonFinite]) -> None:
        for each in news:
            at = {} if each.parameter is None else {"parameter": each.parameter}
            self._journal.mark("nonfinite", step.number, what=each.what, **at)
            where = f" ({each.parameter})" if at else ""
            logger.warning("trackopt: step %d: NaN or infinity in the %s%s", step.number, each.what, where)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on recording as if it had never stopped.

        Call ``flush`` before it: the journal must hold what came before.
        """
        return {
            "observers": {name: observer.state_dict() for name, observer in self._observers.items()},
            "pending": self._pending.state_dict(),
            "turns": self._scheduler_check.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        for name, observer in self._observers.items():
            observer.load_state_dict(state["observers"][name])
        self.load_pending(state)
        self._scheduler_check.load_state_dict(state["turns"])
        self.recorded = self.step

    def load_pending(self, state: Mapping[str, Any]) -> None:
        """Take over of that only what was logged and not recorded; what is so here is forgotten."""
        self._pending.load_state_dict(state["pending"])

    def set_step(self, step: int) -> None:
        """Go on counting from a step, where nothing else is known."""
        for observer in self._observers.values():
            observer.steps = step
        self.recorded = step

    def close(self) -> None:
        """Let go of the optimizers."""
        for observer in self._observers.values():
            observer.close()
