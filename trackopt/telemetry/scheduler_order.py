"""The order of optimizer and scheduler steps: warnings about schedulers that are stepped without the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trackopt.telemetry.error_boundary import ErrorBoundary

_PART = "scheduler check"


class SchedulerOrderCheck:
    """Counts iterations, and warns once per scheduler that was stepped when no optimizer step was taken.

    Args:
        schedulers: By name; one that does not count its steps is not checked.
        stateful: The run's other objects; a ``GradScaler`` among them shows which steps were skipped.
        boundary: Makes the checks; without them, the iterations are still counted.

    Attributes:
        iterations: Completed iterations.
        skipped: Iterations in which an overflow made an optimizer skip its step.
        messages: The warnings since the last call of ``pop_messages``.
    """

    def __init__(self, schedulers: Mapping[str, Any], stateful: Iterable[Any], boundary: ErrorBoundary) -> None:
        self.iterations = self.skipped = 0
        self._schedulers = dict(schedulers)
        self._positions: list[Any] = []
        self._boundary = boundary
        self._scalers = [item for item in stateful if isinstance(item, torch.amp.GradScaler)]
        self._moved_without_step: set[str] = set()  # moved in the last iteration, which took no step
        self._warned: set[str] = set()
        self.messages: list[str] = []
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Remember the positions of schedulers and scalers."""
        self._scaler_update_markers = [*map(_scaler_update_marker, self._scalers)]
        if self._schedulers:
            self._boundary.call(_PART, self._remember_positions)

    def before_first_step(self) -> None:
        """Check the schedulers before the very first step of an optimizer."""
        self._boundary.call(_PART, self._check_first_step)

    def end_iteration(self, *, stepped: bool, overflowed: bool) -> None:
        """Count and check a completed iteration.

        Args:
            stepped: An optimizer took a step in it.
            overflowed: An optimizer reported that it skipped its step.
        """
        skipped = overflowed or (not stepped and self.is_scaler_updated())
        self.iterations += 1
        self.skipped += skipped
        if not stepped or self._moved_without_step:
            self._boundary.call(_PART, self._check_iteration, stepped, skipped)
        self.begin_iteration()

    def is_scaler_updated(self) -> bool:
        """Return whether a ``GradScaler`` was updated in this iteration."""
        return bool(self._scalers) and any(
            before is not _scaler_update_marker(scaler)
            for scaler, before in zip(self._scalers, self._scaler_update_markers, strict=True)
        )

    def pop_messages(self) -> list[str]:
        """Remove and return the warnings since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"iterations": self.iterations, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned, after the schedulers are restored."""
        self.iterations, self.skipped = state["iterations"], state["skipped"]
        self.begin_iteration()

    def _remember_positions(self) -> None:
        self._positions = [_position(scheduler) for scheduler in self._schedulers.values()]

    def _check_first_step(self) -> None:
        for name in self._advanced():
            self._warn(name, "before the optimizer's first step, so it skips its first value")

    def _check_iteration(self, stepped: bool, skipped: bool) -> None:
        moved = set() if stepped else set(self._advanced())
        for name in moved:
            if skipped:
                self._warn(name, "though an overflow had made the GradScaler skip the optimizer's step")
            elif name in self._moved_without_step:  # once may be the end of an epoch between two micro-batches
                self._warn(name, "in iterations without an optimizer step, so it runs ahead")
        self._moved_without_step = moved

    def _advanced(self) -> Iterator[str]:
        for (name, scheduler), before in zip(self._schedulers.items(), self._positions, strict=True):
            now = _position(scheduler)
            if isinstance(before, int) and isinstance(now, int) and now > before:
                yield name

    def _warn(self, name: str, problem: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self.messages.append(f"{name} was stepped {problem}; step it right after each optimizer.step()")


def _position(scheduler: Any) -> Any:
    """Return how far a scheduler is; no integer if it does not count, as timm's."""
    position = getattr(scheduler, "last_epoch", None)
    return getattr(scheduler, "last_step", None) if position is None else position  # of pytorch-warmup


def _scaler_update_marker(scaler: torch.amp.GradScaler) -> object:
    """Return an object that ``scaler.update()`` replaces; reading the scale itself would wait for the device."""
    return getattr(scaler, "_per_optimizer_states", None)
