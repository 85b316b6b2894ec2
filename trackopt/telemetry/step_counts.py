"""The ledger of a loop: what kinds of steps it took, and whether its schedulers moved in turn with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True)
class StepCounts:
    """Counts that are easily taken for one another.

    Attributes:
        iterations: Ended turns of the inner loop: micro-batches, where gradients are accumulated.
        steps: Optimizer steps that changed parameters, of all optimizers together.
        skipped: Iterations whose step a ``GradScaler`` skipped because of an overflow.
        closure_calls: Calls of closures: LBFGS makes several for one step.
    """

    iterations: int
    steps: int
    skipped: int
    closure_calls: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts under the keys of the journal's ``close`` marker."""
        return {
            "iterations": self.iterations,
            "steps": self.steps,
            "skipped": self.skipped,
            "evaluations": self.closure_calls,
        }


class SchedulerOrderCheck:
    """Follows iterations, and tells once for each scheduler that it was stepped when no optimizer step was taken.

    Args:
        schedulers: By name; one that shows no ``last_epoch`` cannot be followed.
        stateful: The run's other objects; a ``GradScaler`` among them tells which steps were skipped.

    Attributes:
        iterations: How many have ended.
        skipped: In how many an overflow made an optimizer skip its step.
    """

    def __init__(self, schedulers: Mapping[str, Any], stateful: Iterable[Any]) -> None:
        self.iterations = self.skipped = 0
        self._schedulers = dict(schedulers)
        self._scalers = [thing for thing in stateful if isinstance(thing, torch.amp.GradScaler)]
        self._moved_without_step: set[str] = set()  # moved in the last iteration, which took no step
        self._warned: set[str] = set()
        self._messages: list[str] = []
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Take note of where everything stands."""
        self._positions = {name: _position(scheduler) for name, scheduler in self._schedulers.items()}
        self._scaler_update_marker = [_scaler_update_marker(scaler) for scaler in self._scalers]

    def before_first_step(self) -> None:
        """Look at the schedulers when an optimizer is about to take its very first step."""
        for name in self._advanced():
            self._tell(name, "before the optimizer's first step, so it skips its first value")

    def end_iteration(self, *, stepped: bool, overflowed: bool) -> None:
        """Look at an iteration that has ended.

        Args:
            stepped: Whether an optimizer took a step in it.
            overflowed: Whether one said that it was made to skip its step.
        """
        skipped = overflowed or (not stepped and self._updated())
        self.iterations += 1
        self.skipped += skipped
        moved = set() if stepped else set(self._advanced())
        for name in moved:
            if skipped:
                self._tell(name, "though an overflow had made the GradScaler skip the optimizer's step")
            elif name in self._moved_without_step:  # once may be the end of an epoch between two micro-batches
                self._tell(name, "in iterations without an optimizer step, so it runs ahead")
        self._moved_without_step = moved
        self.begin_iteration()

    def messages(self) -> list[str]:
        """What is to be told since the last call."""
        waiting, self._messages = self._messages, []
        return waiting

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"iterations": self.iterations, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what ``state_dict`` returned; the schedulers stand where they are put before."""
        self.iterations, self.skipped = state["iterations"], state["skipped"]
        self.begin_iteration()

    def _updated(self) -> bool:
        return any(
            before is not _scaler_update_marker(scaler)
            for scaler, before in zip(self._scalers, self._scaler_update_marker, strict=True)
        )

    def _advanced(self) -> Iterator[str]:
        for name, scheduler in self._schedulers.items():
            before, now = self._positions[name], _position(scheduler)
            if before is not None and now is not None and now > before:
                yield name

    def _tell(self, name: str, what: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self._messages.append(f"{name} was stepped {what}; step it right after each optimizer.step()")


def _position(scheduler: Any) -> int | None:
    position = getattr(scheduler, "last_epoch", None)
    return position if isinstance(position, int) else None


def _scaler_update_marker(scaler: torch.amp.GradScaler) -> object:
    """An object that ``scaler.update()`` replaces; the scale itself could only be read by waiting for the device."""
    return getattr(scaler, "_per_optimizer_states", None)
