"""Signals that ask a training to stop: it finishes its iteration, saves and exits.

Ctrl-C sends SIGINT; Slurm, Kubernetes and torchrun send SIGTERM; Slurm's ``--signal=USR1@60`` sends SIGUSR1 a minute
before the time limit. By default Python would raise ``KeyboardInterrupt`` or die in the middle of a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from trackopt.utils.interactive import is_interactive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

#: Those that stop a training by default.
STOP_SIGNALS = ("SIGTERM", "SIGINT") if sys.platform == "win32" else ("SIGTERM", "SIGINT", "SIGUSR1")
_STDERR = 2
_FORWARD_WINDOW_S = 2.0  # within which torchrun forwards a signal to workers that have received it themselves


class StopSignals:
    """Notes the first stop signal; a second signal goes to the handler that was installed before.

    Under torchrun the same signal shortly after the first is no second signal: torchrun forwards to its workers what
    the whole group received. The user's own handler is called as well. No handler is installed outside the main
    thread, for an ignored signal (as SIGINT under ``nohup``), or for Ctrl-C at a prompt, which means the current line.

    Args:
        single_process: Stop for a local signal at once; with several processes all ranks agree on the step first.
        log: Print a line when a signal arrives.
        names: The signals.

    Attributes:
        local_signal: The first signal that this process received.
        agreed_signal: The signal that the training stops for.
    """

    def __init__(self, *, single_process: bool = True, log: bool = True, names: Sequence[str] = STOP_SIGNALS) -> None:
        self.local_signal: signal.Signals | None = None
        self.agreed_signal: signal.Signals | None = None
        self._single_process, self._log = single_process, log
        self._received_at = 0.0
        self._closed = False
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in map(signal.Signals.__getitem__, names):
                if signal.getsignal(number) not in (signal.SIG_IGN, None) and not (
                    number == signal.SIGINT and is_interactive()
                ):
                    self._previous[number] = signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """The exit code of a process that stopped for the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + int(self.agreed_signal or 0)

    def close(self) -> None:
        """Restore the previous handlers, unless others were installed since."""
        self._closed = True
        if threading.current_thread() is threading.main_thread():  # elsewhere the next signal restores it
            for number in self._previous:
                self._restore_handler(number)

    def _restore_handler(self, number: int) -> bool:
        is_ours = signal.getsignal(number) == self._handle
        if is_ours:
            signal.signal(number, self._previous_handler(number))
        return is_ours

    def _previous_handler(self, number: int) -> Any:
        """Return the handler before ours, past those of runs that are closed by now."""
        previous = self._previous[signal.Signals(number)]
        owner = getattr(previous, "__self__", None)
        return owner._previous_handler(number) if isinstance(owner, StopSignals) and owner._closed else previous

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous_handler(number)
        forked = os.getpid() != self._pid
        if self._closed or (forked and number == signal.SIGTERM):  # a pool terminates its workers and waits for them
            if self._restore_handler(number):
                signal.raise_signal(number)
                return
        elif self.local_signal is not None:
            if not self._is_forwarded_duplicate(number):
                self.close()
                signal.raise_signal(number)
            return
        else:
            self.local_signal, self._received_at = signal.Signals(number), time.monotonic()
            if self._single_process:
                self.agreed_signal = self.local_signal
            if forked:
                return  # a data worker: Ctrl-C reaches it too, but the training still needs it
            text = f"trackopt: {self.local_signal.name}: stopping after this iteration; once more stops at once\n"
            if self._log:
                with contextlib.suppress(OSError):  # Ctrl-C has ended the `tee` that reads it
                    os.write(_STDERR, text.encode())  # a handler may run in the middle of a write to sys.stderr
        if callable(previous) and previous is not signal.default_int_handler:
            chained: Callable[[int, FrameType | None], Any] = previous
            chained(number, frame)

    def _is_forwarded_duplicate(self, number: int) -> bool:
        delay = time.monotonic() - self._received_at
        return number == self.local_signal and delay < _FORWARD_WINDOW_S and "TORCHELASTIC_RUN_ID" in os.environ
