"""Hooks for how a script ends: by an exception that nothing catches, or by ``sys.exit``."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

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


class ExitHook:
    """Remembers a failure that the script reported by ``sys.exit``: nothing is left of the exception at exit.

    Args:
        activity: Returns a number that changes when the training goes on, as it does after an exit that was caught.
    """

    def __init__(self, activity: Callable[[], int]) -> None:
        self._activity = activity
        self._latest: tuple[Any, int] = (None, 0)
        self._previous = sys.exit
        self._hook = self._exit
        sys.exit = self._hook

    @property
    def error(self) -> SystemExit | None:
        """The failure that ends the script; ``None`` without one."""
        status, activity = self._latest
        return SystemExit(status) if status and activity == self._activity() else None

    def close(self) -> None:
        """Restore ``sys.exit``, unless another one was installed since."""
        if sys.exit is self._hook:
            sys.exit = self._previous

    def _exit(self, status: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():  # in another one it ends only that
            self._latest = (status, self._activity())
        self._previous(status)
