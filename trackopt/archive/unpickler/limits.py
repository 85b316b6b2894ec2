"""Limits on a pickle's tree, so that no reader loops, overruns the stack or runs out of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import TensorSubclass, UnknownObject
from trackopt.errors import ArchiveError, ArchiveLimitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MAX_DEPTH = 200
MAX_SHARED = 500_000  # nodes of a tree that mostly repeats the same ones: no training state does, and each is visited
_MAX_REPEATS = 10
_MAX_KEY_PARTS = 100
_CONTAINERS = (dict, list, tuple, TensorSubclass, UnknownObject)


@dataclass(frozen=True)
class Limits:
    """What reading a pickle may take.

    Attributes:
        operations: The operations in it.
        objects: The calls in it.
        containers: The lists, dictionaries, tuples and marks in it, and the references to be kept.
        nodes: The values that it stands for, each counted as often as it is referred to.
        copied_bytes: The bytes that are copied to build them, and those of long texts.
    """

    operations: int = 3_000_000
    objects: int = 600_000
    containers: int = 3_000_000
    nodes: int = 5_000_000
    copied_bytes: int = 64 << 20

    @classmethod
    def for_size(cls, size: int) -> Limits:
        """Return the limits for a pickle of ``size`` bytes in its file, compressed if it is.

        An operation has at least one byte, a container with the reference to it about six, a tensor a hundred. So
        what a program saved stays below the limits, and a short file cannot take long or much memory.
        """
        least = cls()
        return cls(
            max(least.operations, size),
            max(least.objects, size // 8),
            max(least.containers, size // 4),
            max(least.nodes, size),
            max(least.copied_bytes, 4 * size),
        )


class MalformedPickle(Exception):
    """The pickle cannot be read; the message says why, without the file's name."""


class PickleLimitExceeded(MalformedPickle):
    """The pickle describes more than is read; it may be valid."""


def make_error(path: Path, error: MalformedPickle, what: str = "its pickle") -> ArchiveError:
    """Return the error for a file whose pickle cannot be read."""
    if isinstance(error, PickleLimitExceeded):
        return ArchiveLimitError(f"{path}: not checked: {what} is larger than the reader's limits: {error}")
    return ArchiveError(f"{path}: {what} cannot be read: {error}; use another checkpoint")


def checked_key(key: Any) -> Any:
    """Return the key if it is hashable and cheap to hash; raise MalformedPickle otherwise.

    Hashing a tuple walks it in C: deep nesting overruns the stack, and repeated doubling never ends.
    """
    if isinstance(key, list | dict):
        raise MalformedPickle(f"a {type(key).__name__} is used as a dictionary's key")
    pending, seen = [key], 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > _MAX_KEY_PARTS or isinstance(value, list | dict | bytearray):
            raise MalformedPickle("a dictionary's key is not hashable, or has too many parts")
        if isinstance(value, tuple):
            pending.extend(value)
    return key


def check_limits(root: Any, limits: Limits | None = None) -> Any:
    """Break cycles in a tree; refuse one that is too deep or, expanded, too large to walk."""
    max_nodes = (limits or Limits()).nodes
    sizes: dict[int, tuple[int, int]] = {}  # expanded size and depth of each container
    path: dict[int, Any] = {id(root): root}
    frames = [_frame(root)]
    distinct = 0
    while frames:
        node, children, total = frames[-1]
        for key, child in children:
            known = sizes.get(id(child))
            if known is not None:
                total[0] += known[0]
                total[1] = max(total[1], known[1])
            elif id(child) in path:
                _break_cycle(node, key)
                total[0] += 1
            else:
                path[id(child)] = child
                frames.append(_frame(child))
                break
        else:
            sizes[id(node)] = (total[0], total[1] + 1)
            distinct += _count(node)
            _check_size(*sizes[id(node)], max_nodes)
            del path[id(node)]
            frames.pop()
            if frames:
                frames[-1][2][0] += total[0]
                frames[-1][2][1] = max(frames[-1][2][1], total[1] + 1)
    expanded = sizes[id(root)][0]
    if expanded > max(MAX_SHARED, _MAX_REPEATS * distinct):
        raise PickleLimitExceeded(f"its {distinct:,} values hold each other so often that they stand for {expanded:,}")
    return root


def _check_size(size: int, depth: int, max_nodes: int) -> None:
    if size > max_nodes:
        raise PickleLimitExceeded(f"it describes more than {max_nodes:,} values")
    if depth > MAX_DEPTH:
        raise PickleLimitExceeded(f"it is nested more than {MAX_DEPTH} levels deep")


def _frame(node: Any) -> tuple[Any, Iterator[tuple[Any, Any]], list[int]]:
    """Return a container, the keys and values of its nested containers, and its size and depth so far."""
    slots: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        slots = node.items()
    elif isinstance(node, list | tuple):
        slots = enumerate(node)
    elif isinstance(node, TensorSubclass):
        slots = node.components.items()
    elif isinstance(node, UnknownObject):
        slots = tuple(node.components())
    inner = [(key, part) for key, part in slots if isinstance(part, _CONTAINERS) and part]
    return node, iter(inner), [1 + _count(node) - len(inner), 0]


def _count(node: Any) -> int:
    if isinstance(node, TensorSubclass):
        return len(node.components)
    return len(node) if isinstance(node, dict | list | tuple) else 4


def _break_cycle(node: Any, key: Any) -> None:
    """Replace a part of a node that contains the node."""
    if isinstance(node, UnknownObject):
        setattr(node, key, None if key == "state" else type(getattr(node, key))())
    elif isinstance(node, tuple):
        raise MalformedPickle("a tuple contains itself")
    else:
        node[key] = UnknownObject("cycle")
