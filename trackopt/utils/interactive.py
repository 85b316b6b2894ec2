"""Whether a person works in this process: at Python's prompt, or in IPython and its notebooks."""

from __future__ import annotations

import sys


def is_interactive() -> bool:
    """Return whether lines or cells are run one after the other, so that the process outlives an exception."""
    ipython = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (ipython is not None and ipython.get_ipython() is not None)


def latest_error() -> BaseException | None:
    """Return the latest exception that ended a line, a cell or the script."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
