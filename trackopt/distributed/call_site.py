"""Which call of the user's a collective belongs to: the same on all ranks, and named in messages."""

from __future__ import annotations

import inspect

_CALL_NAMES = {
    "wrap": "trackopt.wrap()",
    "__exit__": "run.close()",
    "_at_exit": "the end of its script without run.close()",
}


def call_site(excluded: str) -> tuple[str, str]:
    """Return the public function that the user called, and the line of trackopt that calls a collective.

    Args:
        excluded: The package of the collectives, in which that line is not.
    """
    frame, function, site = inspect.currentframe(), "", ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("trackopt."):
            function = frame.f_code.co_name
            if not site and not module.startswith(excluded):
                site = f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return function, site


def call_name(function: str) -> str:
    """Return a public function as a message names it."""
    return _CALL_NAMES.get(function, f"run.{function}()")
