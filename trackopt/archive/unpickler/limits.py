"""Limits on a pickle's tree, so that no reader loops, overruns the stack or runs out of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import TensorSubclass, UnknownObject, holds_nodes
from trackopt.errors import ArchiveError, ArchiveLimitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MAX_DEPTH = 200
MAX_SHARED = 500_000  # nodes of a tree that mostly repeats the same ones: no training state does, and each is visited
_MAX_REPEATS = 10
_MAX_KEY_PARTS = 100
_LARGE_BYTES = 16_000_000
_CHECK_BYTES = 150  # for each container
_CONTAINERS = (dict, list, tuple, TensorSubclass, UnknownObject)


@dataclass(frozen=True)
class Limits:
    """What reading a pickle may take.

    Attributes:
        operations: The operations in it; a call counts as several. A million take less than half a second.
        memory: The bytes of what it describes, and of copies that are made to build it.
        nodes: The values that it stands for, each counted as often as it is referred to.
    """

    operations: int = 6_000_000
    memory: int = 200 << 20
    nodes: int = 5_000_000

    @classmethod
    def for_size(cls, size: int, file_size: int | None = None) -> Limits:
        """Return the limits for a pickle of ``size`` bytes in its file, compressed if it is.

        What a program saved takes at most one operation for each byte and 40 bytes of memory, so it stays below the
        limits. A file of less than 16 MB, whatever is in it, takes less than 5 s and 256 MiB.

        Args:
            size: The bytes of the pickle.
            file_size: The bytes of the file, if it is a stranger's: one with many tensors is much larger than its
                pickle.
        """
        least = cls()
        operations = size if file_size is None else min(size, file_size // 3)
        memory = least.memory + 40 * max(0, size - _LARGE_BYTES)
        return cls(max(least.operations, operations), memory, max(least.nodes, size))


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


def check_limits(root: Any, max_nodes: int = Limits.nodes, memory: int = Limits.memory) -> Any:
    """Break cycles in a tree; refuse one that is too deep or, expanded, too large to walk.

    Args:
        root: The tree.
        max_nodes: The values that it may stand for.
        memory: Bytes that the check itself may take.

    Raises:
        PickleLimitExceeded: It exceeds a limit.
        MalformedPickle: A tuple in it contains itself.
    """
    sizes: dict[int, int] = {}  # of each container, 256 times its expanded size, plus its depth
    path: dict[int, Any] = {id(root): root}
    frames = [_Frame(root)]
    distinct = 0
    while frames:
        frame = frames[-1]
        for key, child in frame.children:
            known = sizes.get(id(child))
            if known is not None:
                frame.add(known)
            elif id(child) in path:
                _break_cycle(frame.node, key)
            else:
                path[id(child)] = child
                frames.append(_Frame(child))
                break
        else:
            size = sizes[id(frame.node)] = frame.total()
            distinct += _count(frame.node)
            _check_size(size, len(frames), max_nodes)
            if len(sizes) * _CHECK_BYTES > memory:
                raise PickleLimitExceeded(f"it has more than {len(sizes):,} lists, dictionaries and tuples")
            del path[id(frame.node)]
            frames.pop()
            if frames:
                frames[-1].add(size)
        if len(frames) > MAX_DEPTH:
            raise PickleLimitExceeded(f"it is nested more than {MAX_DEPTH} levels deep")
    expanded = sizes[id(root)] >> 8
    if expanded > max(MAX_SHARED, _MAX_REPEATS * distinct):
        raise PickleLimitExceeded(f"its {distinct:,} values hold each other so often that they stand for {expanded:,}")
    return root


def _check_size(size: int, level: int, max_nodes: int) -> None:
    if size >> 8 > max_nodes:
        raise PickleLimitExceeded(f"it describes more than {max_nodes:,} values")
    if (size & 255) + level - 1 > MAX_DEPTH:
        raise PickleLimitExceeded(f"it is nested more than {MAX_DEPTH} levels deep")


class _Frame:
    """A container whose parts are being visited.

    Attributes:
        node: The container.
        children: The keys and values of its nested containers that are still to be visited.
    """

    __slots__ = ("_depth", "_size", "children", "node")

    def __init__(self, node: Any) -> None:
        self.node = node
        self.children = _inner(node)
        self._size = 1 + _count(node)
        self._depth = 0

    def add(self, size: int) -> None:
        """Count a part: its expanded size and its depth."""
        self._size += (size >> 8) - 1
        self._depth = max(self._depth, size & 255)

    def total(self) -> int:
        """Return the container's size and depth."""
        return self._size << 8 | min(self._depth + 1, 255)


def _inner(node: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over the keys and values of a container's nested containers."""
    slots: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        slots = node.items() if holds_nodes(node.values()) else ()
    elif isinstance(node, list | tuple):
        slots = enumerate(node) if holds_nodes(node) else ()
    elif isinstance(node, TensorSubclass):
        slots = node.components.items()
    elif isinstance(node, UnknownObject):
        slots = tuple(node.components())
    return ((key, part) for key, part in slots if isinstance(part, _CONTAINERS) and part)


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
