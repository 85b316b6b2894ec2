"""Suggestions for a name that does not exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_MIN_SIMILARITY = 0.5  # of 1
_MAX_LISTED = 8


def suggest(name: str, names: Iterable[str], *, within: Path | None = None) -> str:
    """Return the end of a message about a wrong name: the most similar right name, or the list of right names.

    Args:
        name: The wrong name.
        names: The right names.
        within: The directory of the names, if they are files. It is shown but does not count for the similarity.

    Example:
        >>> suggest("StepLr", ["StepLR", "ConstantLR"])
        'did you mean StepLR?'
        >>> suggest("x", ["loss", "accuracy"])
        'available: accuracy, loss'
    """
    import difflib  # only a mistake needs it

    known = {right.lower(): str(within / right) if within else right for right in names}
    similar = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_MIN_SIMILARITY)
    if similar:
        return f"did you mean {known[similar[0]]}?"
    listed = sorted(known.values())
    more = f", … {len(listed)} in all" if len(listed) > _MAX_LISTED else ""
    return f"available: {', '.join(listed[:_MAX_LISTED])}{more}" if listed else "none is available"


def suggest_path(path: Path) -> str:
    """Return ``; did you mean …?`` for a path that does not exist, or nothing if no sibling is similar."""
    try:
        hint = suggest(path.name, [sibling.name for sibling in path.parent.iterdir()], within=path.parent)
    except OSError:
        return ""
    return f"; {hint}" if hint.startswith("did") else ""
