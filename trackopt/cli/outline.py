"""A checkpoint's tree as an outline: keys, and what stands below them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from trackopt.archive.describe import describe
from trackopt.archive.tree import Tensor, children
from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINES = 5_000
_ITEMS = 200  # of one list or dictionary


def outline(tree: Any) -> Iterator[str]:
    """The lines; what is too much is counted in place of being shown."""
    lines = _below(tree, 2)
    yield from islice(lines, _LINES)
    if next(lines, None) is not None:
        yield f"  … and more: {_LINES:,} lines are shown; --tensors and --json have no such limit"


def _below(node: Any, indent: int) -> Iterator[str]:
    shown = list(islice(children(node), _ITEMS + 1))
    for name, child in shown[:_ITEMS]:
        key = console.sanitize(name)
        if _leaf(child):
            yield _line(indent, f"{key}: {console.number(child) if not isinstance(child, Tensor) else _tensor(child)}")
        else:
            yield _line(indent, f"{key}  {_count(child)}")
            yield from _below(child, indent + 2)
    if len(shown) > _ITEMS:
        yield _line(indent, f"… {_count(node)} in all")


def _leaf(node: Any) -> bool:
    """Whether a node stands on one line: what has nothing below it, and lists of such plain values."""
    if isinstance(node, list | tuple):
        return not any(isinstance(child, Tensor) or next(children(child), None) for child in node)
    return next(children(node), None) is None


def _tensor(tensor: Tensor) -> str:
    return f"{'×'.join(map(str, tensor.shape)) or 'scalar'} {tensor.dtype}"


def _count(node: Any) -> str:
    if isinstance(node, dict | list | tuple):
        one, several = ("entry", "entries") if isinstance(node, dict) else ("item", "items")
        return f"{len(node):,} {one if len(node) == 1 else several}"
    return describe(node, 0)


def _line(indent: int, text: str) -> str:
    room = console.text_width() - min(indent, 40)
    text = console.sanitize(text)
    return " " * min(indent, 40) + (text if len(text) <= room else f"{text[: room - 1]}…")
