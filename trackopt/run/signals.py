"""Signals that ask a training to stop: it ends its iteration, saves, and goes.

Ctrl-C sends SIGINT; Slurm, Kubernetes and torchrun send SIGTERM; Slurm's ``--signal=USR1@60`` sends SIGUSR1 a minute
before the time is up. Python would raise ``KeyboardInterrupt`` or die in the middle of a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STDERR = 2
_FORWARD_WINDOW_S = (
    2.0  # seconds within which a signal that torchrun and its workers were sent comes to these again, from it
)


class StopSignals:
    """Takes note of the first stop signal; a second one does what it did before.

    Under torchrun the same one right behind it is no second one: torchrun passes on what it was sent with its workers.
    A handler of the user's own is called as well. Nothing is installed outside the main thread, for a signal that is
    ignored (as SIGINT is under ``nohup``), and for Ctrl-C at a prompt, where it means the current line.

    Args:
        single_process: Stop for a local signal at once; with several processes all ranks agree on the step first.
        log: Print a line when a signal arrives.

    Attributes:
        local_signal: The signal that came to this process, if one did.
        agreed_signal: The one that the training stops for.
    """

    def __init__(self, *, single_process: bool = True, log: bool = True) -> None:
        self.local_signal: signal.Signals | None = None
        self.agreed_signal: signal.Signals | None = None
        self._single_process, self._log = single_process, log
        self._at = 0.0  # when it came
        self._closed = False
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None) and not _is_interactive(number):
                    self._before[number] = signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """What a process that stopped for the signal ends with: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + int(self.agreed_signal or 0)

    def close(self) -> None:
        """Put the earlier handlers back, where nobody has put others since."""
        self._closed = True
        if threading.current_thread() is threading.main_thread():  # elsewhere the next signal does it
            for number in self._before:
                self._restore_handler(number)

    def _restore_handler(self, number: int) -> bool:
        found = signal.getsignal(number) == self._handle
        if found:
            signal.signal(number, self._previous_handler(number))
        return found

    def _previous_handler(self, number: int) -> Any:
        """The handler that was there before; one of a run that is closed by now is none."""
        before = self._before[signal.Signals(number)]
        other = getattr(before, "__self__", None)
        return other._previous_handler(number) if isinstance(other, StopSignals) and other._closed else before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._previous_handler(number)
        forked = os.getpid() != self._pid
        if self._closed or (forked and number == signal.SIGTERM):  # a pool ends its workers so, and waits for that
            if self._restore_handler(number):
                signal.raise_signal(number)
                return
        elif self.local_signal is not None:
            if not self._is_forwarded_duplicate(number):
                self.close()
                signal.raise_signal(number)
            return
        else:
            self.local_signal, self._at = signal.Signals(number), time.monotonic()
            if self._single_process:
                self.agreed_signal = self.local_signal
            if forked:
                return  # a data worker: Ctrl-C reaches it too, and the training still needs it
            text = f"trackopt: {self.local_signal.name}: stopping after this iteration; once more stops at once\n"
            if self._log:
                with contextlib.suppress(OSError):  # Ctrl-C has ended the `tee` that reads it
                    os.write(_STDERR, text.encode())  # a handler may run in the middle of a write to sys.stderr
        if callable(before) and before is not signal.default_int_handler:
            chained: Callable[[int, FrameType | None], Any] = before
            chained(number, frame)

    def _is_forwarded_duplicate(self, number: int) -> bool:
        behind = time.monotonic() - self._at
        return number == self.local_signal and behind < _FORWARD_WINDOW_S and "TORCHELASTIC_RUN_ID" in os.environ


def _is_interactive(number: signal.Signals) -> bool:
    return number == signal.SIGINT and hasattr(sys, "ps1")
