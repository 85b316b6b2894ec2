"""Format a checkpoint's tree as an indented outline."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from trackopt.archive.describe import describe
from trackopt.archive.tree import Tensor, children
from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_LINES = 5_000
_MAX_ITEMS = 200  # per list or dictionary


def format_outline(tree: Any) -> Iterator[str]:
    """Yield the lines of the outline; items beyond the limits are only counted."""
    lines = _format_children(tree, 2)
    yield from islice(lines, _MAX_LINES)
    if next(lines, None) is not None:
        yield f"  … truncated after {_MAX_LINES:,} lines; --tensors and --json have no such limit"


def _format_children(node: Any, indent: int) -> Iterator[str]:
    shown = list(islice(children(node), _MAX_ITEMS + 1))
    for name, child in shown[:_MAX_ITEMS]:
        key = console.sanitize(name)
        if _is_one_line(child):
            yield _format_line(
                indent,
                f"{key}: {console.format_number(child) if not isinstance(child, Tensor) else _format_tensor(child)}",
            )
        else:
            yield _format_line(indent, f"{key}  {_format_count(child)}")
            yield from _format_children(child, indent + 2)
    if len(shown) > _MAX_ITEMS:
        yield _format_line(indent, f"… {_format_count(node)} in all")


def _is_one_line(node: Any) -> bool:
    """Return whether a node fits on one line: one without children, or a list of plain values."""
    if isinstance(node, list | tuple):
        return not any(isinstance(child, Tensor) or next(children(child), None) for child in node)
    return next(children(node), None) is None


def _format_tensor(tensor: Tensor) -> str:
    return f"{'×'.join(map(str, tensor.shape)) or 'scalar'} {tensor.dtype}"


def _format_count(node: Any) -> str:
    if isinstance(node, dict | list | tuple):
        singular, plural = ("entry", "entries") if isinstance(node, dict) else ("item", "items")
        return f"{len(node):,} {singular if len(node) == 1 else plural}"
    return describe(node, 0)


def _format_line(indent: int, text: str) -> str:
    room = console.text_width() - min(indent, 40)
    text = console.sanitize(text)
    return " " * min(indent, 40) + (text if len(text) <= room else f"{text[: room - 1]}…")
