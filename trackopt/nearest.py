"""The nearest right name, for messages about a wrong one."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_CLOSE = 0.5  # of 1: how alike two names must be
_SHOWN = 8


def closest(name: str, names: Iterable[str]) -> str:
    """The nearest right name as the end of a message, or the names that there are.

    Example:
        >>> closest("StepLr", ["StepLR", "ConstantLR"])
        'did you mean StepLR?'
        >>> closest("x", ["loss", "accuracy"])
        'there is accuracy, loss'
    """
    known = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_CLOSE)
    if found:
        return f"did you mean {known[found[0]]}?"
    listed = sorted(known.values())
    more = f", … {len(listed)} in all" if len(listed) > _SHOWN else ""
    return f"there is {', '.join(listed[:_SHOWN])}{more}" if listed else "there is none"
