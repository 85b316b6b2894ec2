"""Short texts for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


def join_names(names: Iterable[Any], most: int = 3) -> str:
    """Format names as ``a, b, c and 4 more``."""
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_shape_dtype(shape: tuple[int, ...], dtype: str) -> str:
    """Format as ``8×4 float32``."""
    return f"{'×'.join(map(str, shape)) or 'a scalar'} {dtype}"
