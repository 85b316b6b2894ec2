"""When a training stops before its end: for a signal, at a step that all ranks agree on."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from trackopt.distributed.preemption import PreemptionSync
from trackopt.run.signals import StopSignals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trackopt.distributed.collectives import Collectives

_SAVE = "save"  # a request for a checkpoint; a request to stop is the number of a signal


class StopController:
    """Stop signals of this process, and the agreement of all ranks on the step at which they stop or save.

    Args:
        collectives: The ranks of the training.
        signals: The names of the stop signals.
    """

    def __init__(self, collectives: Collectives, signals: Sequence[str]) -> None:
        self._collectives = collectives
        self._signals = StopSignals(
            single_process=collectives.world_size == 1, log=collectives.is_rank_zero, names=signals
        )
        self._sync: PreemptionSync | None = None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that the training stops for, once all ranks know of it."""
        return self._signals.agreed_signal

    @property
    def exit_code(self) -> int:
        """The exit code of a process that stopped for the signal."""
        return self._signals.exit_code

    def start_sync(self, step: int, is_save_overdue: Callable[[], bool]) -> None:
        """Begin to agree with the other ranks, if there are any.

        Args:
            step: Completed optimizer steps.
            is_save_overdue: Called in a thread; True where time makes a checkpoint due.
        """

        def pending_request() -> str | None:
            if self._signals.local_signal is not None:
                return str(int(self._signals.local_signal))
            return _SAVE if self._collectives.is_rank_zero and is_save_overdue() else None

        if self._collectives.world_size > 1:
            self._sync = PreemptionSync(self._collectives, pending_request, step)

    def reached(self, step: int) -> bool:
        """Note that an iteration ended after ``step``; return True if the ranks agreed to save here.

        If they agreed to stop here, ``signal`` is set afterwards.
        """
        request = self._sync.reached(step) if self._sync is not None else None
        if request is not None and request != _SAVE:
            self._signals.agreed_signal = signal.Signals(int(request))
        return request == _SAVE

    def has_any_rank_signal(self) -> bool:
        """Return True if a signal came to any rank; all ranks then stop for the same one. Called by all ranks."""
        local = self._signals.agreed_signal or self._signals.local_signal
        numbers = [number for number in self._collectives.all_gather_object(local and int(local)) if number]
        self._signals.agreed_signal = signal.Signals(numbers[0]) if numbers else None
        return bool(numbers)

    def stop_after_error(self) -> bool:
        """Return True if a signal came to this process; it stops for it without the others, which may be gone."""
        self._signals.agreed_signal = self._signals.agreed_signal or self._signals.local_signal
        return self._signals.agreed_signal is not None

    def close(self) -> None:
        """Restore the signal handlers and end the agreement."""
        self._signals.close()
        if self._sync is not None:
            self._sync.close()
