"""The hook for exceptions that nothing catches: after a stop signal, the signal decides how the process ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_DATA_WORKER = "DataLoader worker"  # how torch's message about a worker begins that a signal has ended


class UncaughtExceptionHook:
    """Calls a function before the interpreter ends for an exception; the previous hook is called first.

    Args:
        on_exception: Called with the exception; may raise ``SystemExit``, whose code becomes that of the process.
        expects: Returns whether the end of a data worker is no news, so that no traceback is shown.
    """

    def __init__(self, on_exception: Callable[[BaseException], None], expects: Callable[[], bool]) -> None:
        self._on_exception = on_exception
        self._expects = expects
        self._previous = sys.excepthook
        self._hook = self._handle
        sys.excepthook = self._hook

    def close(self) -> None:
        """Restore the previous hook, unless another one was installed since."""
        if sys.excepthook is self._hook:
            sys.excepthook = self._previous

    def _handle(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (self._expects() and str(error).startswith(_DATA_WORKER)):
            self._previous(kind, error, trace)
        self._on_exception(error)
