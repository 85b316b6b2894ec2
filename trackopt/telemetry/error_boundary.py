"""A boundary that keeps exceptions of the telemetry out of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


def _raise(part: str, error: Exception) -> NoReturn:  # noqa: ARG001 - as `ErrorBoundary` calls it
    raise error


class ErrorBoundary:
    """Calls the parts of the telemetry; a part that fails is reported once and skipped from then on.

    ``KeyboardInterrupt`` and ``SystemExit`` pass.

    Args:
        report: Called with the name of a part, such as ``statistics``, and its first error. Default: raise the error.

    Attributes:
        failed: The parts that failed.

    Example:
        >>> boundary = ErrorBoundary(lambda part, error: print(f"{part}: {error!r}"))
        >>> boundary.call("statistics", int, "five"), boundary.call("statistics", int, "5")
        statistics: ValueError("invalid literal for int() with base 10: 'five'")
        (None, None)
    """

    def __init__(self, report: Callable[[str, Exception], None] = _raise) -> None:
        self.failed: set[str] = set()
        self._report = report

    def call(self, part: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the result of a function; ``None`` if it fails, or the part has failed before."""
        if part in self.failed:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - no failure of the telemetry may end the training
            self._fail(part, error)
            return None

    def call_always(self, part: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a function also after its part has failed: other ranks wait for it in a collective."""
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - no failure of the telemetry may end the training
            self._fail(part, error)
            return None

    def _fail(self, part: str, error: Exception) -> None:
        if part not in self.failed:
            self._report(part, error)
            self.failed.add(part)
