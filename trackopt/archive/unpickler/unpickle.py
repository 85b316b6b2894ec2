"""Running one pickle: the entry point of the unpickler."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.unpickler.limits import Limits, MalformedPickle, PickleLimitExceeded, check_limits
from trackopt.archive.unpickler.machine import PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.archive.unpickler.tensor_constructors import storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trackopt.archive.io.byte_ranges import ByteRange


@dataclass(frozen=True)
class Unpickled:
    """The result of running a pickle.

    Attributes:
        tree: Plain values and nodes.
        globals: Every name that the pickle refers to, in order.
        end: The offset after the pickle.
    """

    tree: Any
    globals: tuple[str, ...]
    end: int


def unpickle(
    data: bytes | ByteRange,
    load_nested: Callable[[ByteRange], Any],
    persistent: Callable[[Any], Any] = storage,
    limits: Limits | None = None,
) -> Unpickled:
    """Run a pickle without importing or calling anything that it names.

    Args:
        data: The bytes, or the range to read them from; the pickle may end before they do.
        load_nested: Returns the node for a storage that was pickled as a whole file.
        persistent: Returns the node for a persistent id.
        limits: What reading it may take; by default in proportion to its bytes.

    Raises:
        MalformedPickle: It is malformed, or it exceeds a limit.
    """
    if limits is None:
        size = len(data) if isinstance(data, bytes) else data.size
        limits = Limits.for_size(size, size)
    machine = PickleMachine(data, persistent, load_nested, limits)
    with _without_collections():
        tree = machine.run(OPERATIONS)
    return Unpickled(tree, tuple(machine.globals), machine.offset)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector from visiting millions of new values again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unpickle_truncated(data: ByteRange, load_nested: Callable[[ByteRange], Any]) -> Unpickled:
    """Run a pickle that ends early; return what is complete in the dictionaries that it was filling.

    Args:
        data: The range to read it from.
        load_nested: Returns the node for a storage that was pickled as a whole file.

    Raises:
        MalformedPickle: Nothing is complete, or it exceeds a limit.
    """
    limits = Limits.for_size(data.size, data.size)
    machine = PickleMachine(data, storage, load_nested, limits)
    try:
        tree = machine.run(OPERATIONS)
    except PickleLimitExceeded:
        raise
    except MalformedPickle:
        tree = check_limits(machine.incomplete_dictionary(), limits.nodes, machine.memory)
        if not tree:
            raise
    return Unpickled(tree, tuple(machine.globals), machine.offset)
