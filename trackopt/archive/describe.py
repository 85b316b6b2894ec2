"""A value of a checkpoint's tree in a few words, however large it is."""

from __future__ import annotations

from itertools import islice
from typing import Any

from trackopt.archive.tree import Global, Storage, Tensor, TensorSubclass, UnknownObject

_ITEMS = 4


def describe(value: Any, depth: int = 2) -> str:
    """A short text for a value; at most some ten items of a container are looked at.

    Control characters are left in it: whoever prints it cleans it.

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
        return f"<{value.name}>"
    if isinstance(value, dict):
        return _inside(
            "{}", len(value), (f"{describe(k, 0)}: {describe(v, depth - 1)}" for k, v in value.items()), depth
        )
    if isinstance(value, list | tuple):
        marks = "[]" if isinstance(value, list) else "()"
        return _inside(marks, len(value), (describe(item, depth - 1) for item in value), depth)
    if isinstance(value, Global):
        return value.name
    return repr(value)


def _inside(marks: str, length: int, parts: Any, depth: int) -> str:
    if not length:
        return marks
    if depth <= 0:
        return f"{marks[0]}{length} items{marks[1]}"
    shown = list(islice(parts, _ITEMS))
    if length > _ITEMS:
        shown.append(f"… {length} items")
    return marks[0] + ", ".join(shown) + marks[1]
