"""Short texts for the values of a checkpoint's tree, whatever their size."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, Storage, Tensor, TensorSubclass, UnknownObject, config_content

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_ITEMS = 4


def describe(value: Any, depth: int = 2) -> str:
    """Return a short text for a value, from at most some ten items of a container.

    Control characters stay in it; the caller that prints it must sanitize it.

    Example:
        >>> describe((0.9, 0.999)), describe({"a": [1] * 9})
        ('(0.9, 0.999)', '{a: [1, 1, 1, 1, … 9 items]}')
    """
    if isinstance(value, TensorSubclass):
        return f"{value.dtype} {value.kind.rpartition('.')[2]} tensor {list(value.shape)}"
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor {list(value.shape)}"
    if isinstance(value, Storage):
        return f"storage of {value.nbytes:,} bytes"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, str):
        return value if len(value) <= 60 else f"{value[:57]}…"
    if isinstance(value, UnknownObject):
        content = config_content(value)
        return f"<{value.name}>" if content is None else describe(content, depth)
    if isinstance(value, dict):
        items = (f"{describe(k, 0)}: {describe(v, depth - 1)}" for k, v in value.items())
        return _join("{}", len(value), items, depth)
    if isinstance(value, list | tuple):
        marks = "[]" if isinstance(value, list) else "()"
        return _join(marks, len(value), (describe(item, depth - 1) for item in value), depth)
    if isinstance(value, Global):
        return value.name
    return repr(value)


def _join(marks: str, length: int, items: Iterable[str], depth: int) -> str:
    if not length:
        return marks
    if depth <= 0:
        return f"{marks[0]}{length} items{marks[1]}"
    shown = list(islice(items, _MAX_ITEMS))
    if length > _MAX_ITEMS:
        shown.append(f"… {length} items")
    return marks[0] + ", ".join(shown) + marks[1]
