"""The nearest right name, for messages about a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_CLOSE = 0.5  # of 1: how alike two names must be
_SHOWN = 8


def suggest(name: str, names: Iterable[str], *, within: Path | None = None) -> str:
    """The nearest right name as the end of a message, or the names that there are.

    Args:
        name: The wrong one.
        names: The right ones.
        within: The directory that they are in, if they are files; it is shown with them, and makes none alike.

    Example:
        >>> suggest("StepLr", ["StepLR", "ConstantLR"])
        'did you mean StepLR?'
        >>> suggest("x", ["loss", "accuracy"])
        'there is accuracy, loss'
    """
    import difflib  # only a mistake needs it

    known = {each.lower(): str(within / each) if within else each for each in names}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_CLOSE)
    if found:
        return f"did you mean {known[found[0]]}?"
    listed = sorted(known.values())
    more = f", … {len(listed)} in all" if len(listed) > _SHOWN else ""
    return f"there is {', '.join(listed[:_SHOWN])}{more}" if listed else "there is none"


def suggest_path(path: Path) -> str:
    """``; did you mean …?`` for a path that is not there, by the names beside it; nothing where none is alike."""
    try:
        told = suggest(path.name, [each.name for each in path.parent.iterdir()], within=path.parent)
    except OSError:
        return ""
    return f"; {told}" if told.startswith("did") else ""
