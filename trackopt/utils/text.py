"""Short texts for messages."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


def join_names(names: Iterable[Any], most: int = 3) -> str:
    """Format names as ``a, b, c and 4 more``."""
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe_error(error: BaseException) -> str:
    r"""Format as ``ValueError: the first line of its message``.

    Example:
        >>> describe_error(ValueError("no number\nin line 3")), describe_error(KeyboardInterrupt())
        ('ValueError: no number', 'KeyboardInterrupt')
    """
    kind = type(error).__name__
    try:
        message = str(error).strip()
    except Exception:  # noqa: BLE001 - an exception of the user's may raise another one here
        message = ""
    return f"{kind}: {message.splitlines()[0]}" if message else kind


def format_shape_dtype(shape: tuple[int, ...], dtype: str) -> str:
    """Format as ``8×4 float32``."""
    return f"{'×'.join(map(str, shape)) or 'a scalar'} {dtype}"


def matches_glob(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a dotted name, the tail of it after a dot, or a part of the path to it.

    Example:
        >>> [matches_glob("model.head.weight", pattern) for pattern in ("model.*", "head.weight", "head", "*.bias")]
        [True, True, True, False]
    """
    return any(fnmatchcase(name, whole) for whole in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))
