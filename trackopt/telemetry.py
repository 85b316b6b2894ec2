"""From what happened in an iteration to one line of the journal."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from trackopt.observe import Ledger, NonFinite, Observer, Turns
from trackopt.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trackopt.checkpoint import Training
    from trackopt.journal import Journal
    from trackopt.pending import Gather

_FORGOTTEN = 100  # steps without the end of an iteration, after which the user is reminded of it

logger = logging.getLogger("trackopt")


def _names(training: Training, optimizer: str) -> list[list[str]]:
    return training.parameter_names()[optimizer]


class Telemetry:
    """Watches the optimizers of a training, takes what the user logs, and records both step by step.

    Args:
        training: Whose optimizers and schedulers to watch.
        journal: Where the records go.
        gather: As `Pending` takes it.
        **options: ``stats``, ``stats_every`` and ``histograms_every`` as `Observer` takes them.

    Attributes:
        recorded: The step of the latest record.
        latest: What it says.
    """

    def __init__(self, training: Training, journal: Journal, gather: Gather, **options: Any) -> None:
        self.recorded = 0
        self.latest: Mapping[str, float] = {}
        self._journal = journal
        self._pending = Pending(gather)
        self._turns = Turns(training.schedulers, training.stateful.values())
        optimizers = training.optimizers
        self._observers = {
            name: Observer(
                optimizer,
                prefix=f"{name}." if len(optimizers) > 1 else "",
                names=partial(_names, training, name),
                before_first=self._turns.before_first_step,
                **options,
            )
            for name, optimizer in optimizers.items()
        }
        self._reminded = False
        self._ailing: set[str] = set()

    @property
    def step(self) -> int:
        """Completed optimizer steps; with several optimizers, those of the one that took most."""
        return max(observer.steps for observer in self._observers.values())

    @property
    def ledger(self) -> Ledger:
        """What kinds of steps there were."""
        observers = self._observers.values()
        return Ledger(
            iterations=self._turns.iterations,
            steps=sum(observer.steps for observer in observers),
            skipped=self._turns.skipped,
            evaluations=sum(observer.evaluations for observer in observers),
        )

    def log(self, metrics: Mapping[str, Any], *, shared: bool = False) -> None:
        """Take what the user logs; with ``shared``, the mean of what all ranks do.

        Raises:
            UsageError: A value is not a number.
        """
        self._pending.add(metrics, shared=shared)
        if not self._reminded and self.step - self.recorded > _FORGOTTEN:
            self._reminded = True
            logger.warning(
                "trackopt: %d steps, but no iteration has ended: take the batches from run.batches(loader), or call "
                "run.step() at the end of each iteration",
                self.step,
            )

    def begin_iteration(self) -> None:
        """Take note of where the schedulers stand."""
        self._turns.begin_iteration()

    def end_iteration(self) -> bool:
        """Record the step that was taken in it; whether there was one."""
        stepped = self.step > self.recorded
        overflowed = sum(observer.take_overflow() for observer in self._observers.values()) > 0
        self._turns.end_iteration(stepped=stepped, overflowed=overflowed)
        for message in self._turns.messages():
            logger.warning("trackopt: %s", message)
        if stepped:
            metrics = self._pending.take()
            self.recorded = self.step
            self._tell(self._losses(metrics))
            for observer in self._observers.values():
                metrics |= observer.take()
                self._tell(observer.take_news())
                if histograms := observer.take_histograms():
                    self._journal.histograms(self.recorded, histograms)
            self._journal.record(self.recorded, metrics)
            self._pending.recorded = set(metrics)
            self.latest = metrics
        return stepped

    def record_rest(self) -> None:
        """Record what was logged behind the last step, as a second line of that step."""
        if self.recorded and (rest := self._pending.take_rest()):
            self._journal.record(self.recorded, rest)

    def _losses(self, metrics: Mapping[str, float]) -> Iterator[NonFinite]:
        """The logged losses that are not finite, and were at the step before."""
        ailing = {key for key, value in metrics.items() if not math.isfinite(value) and "loss" in key.lower()}
        yield from (NonFinite(key) for key in sorted(ailing - self._ailing))
        self._ailing = ailing

    def _tell(self, news: Iterable[NonFinite]) -> None:
        for each in news:
            at = {} if each.parameter is None else {"parameter": each.parameter}
            self._journal.mark("nonfinite", self.recorded, what=each.what, **at)
            where = f" ({each.parameter})" if at else ""
            logger.warning("trackopt: step %d: NaN or infinity in the %s%s", self.recorded, each.what, where)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on recording as if it had never stopped."""
        return {
            "observers": {name: observer.state_dict() for name, observer in self._observers.items()},
            "pending": self._pending.state_dict(),
            "turns": self._turns.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        for name, observer in self._observers.items():
            observer.load_state_dict(state["observers"][name])
        self._pending.load_state_dict(state["pending"])
        self._turns.load_state_dict(state["turns"])
        self.recorded = self.step

    def close(self) -> None:
        """Let go of the optimizers."""
        for observer in self._observers.values():
            observer.close()
