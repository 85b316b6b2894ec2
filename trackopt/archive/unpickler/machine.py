"""A pickle machine that builds only plain values and nodes.

A name in the file is never imported and never called: it becomes a `Global`, and a call of it is described by
`trackopt.archive.unpickler.constructors`. The cost of a hostile pickle is bounded: in operations, in bytes and, after
it has run, in depth and in expanded size. The opcodes are in `trackopt.archive.unpickler.opcodes`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, UnknownObject
from trackopt.archive.unpickler.buffer import BufferedReader
from trackopt.archive.unpickler.constructors import NESTED_STORAGE, construct
from trackopt.archive.unpickler.limits import Limits, MalformedPickle, PickleLimitExceeded, check_limits, checked_key
from trackopt.archive.unpickler.numpy_constructors import apply_build

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trackopt.archive.io.byte_ranges import ByteRange

_STOP = ord(".")
_NESTED_COST = 50  # objects


class PickleMachine(BufferedReader):
    """A machine that runs one pickle.

    Args:
        data: The bytes, or the range to read them from; the pickle may end before they do.
        persistent: Returns the node for a persistent id.
        load_nested: Returns the node for a storage that was pickled as a whole file.
        limits: What reading it may take.

    Attributes:
        globals: Every name that the pickle refers to, in order.
    """

    def __init__(
        self,
        data: bytes | ByteRange,
        persistent: Callable[[Any], Any],
        load_nested: Callable[[ByteRange], Any],
        limits: Limits,
    ) -> None:
        super().__init__(data, limits.copied_bytes)
        self._limits = limits
        self.globals: dict[str, Global] = {}
        self._persistent = persistent
        self._load_nested = load_nested
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._memo_keys: dict[int, int] = {}
        self._objects = 0
        self._containers = 0
        self._copied = 0

    def run(self, operations: Mapping[int, Callable[[PickleMachine], None]]) -> Any:
        """Run the pickle; return the object that it describes.

        Args:
            operations: The function of each opcode.

        Raises:
            MalformedPickle: It is malformed, or it exceeds a limit.
        """
        try:
            for _ in range(self._limits.operations):
                if self.position > self.low_watermark:
                    self.refill()
                code = self.data[self.position]
                self.position += 1
                if code == _STOP:
                    return check_limits(self._stack.pop(), self._limits)
                operations[code](self)
        except KeyError as error:
            raise MalformedPickle(f"unknown operation or missing reference {error} at byte {self.offset}") from error
        except IndexError as error:
            raise MalformedPickle(f"it ends, or pops from an empty stack, at byte {self.offset}") from error
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error, RecursionError) as error:
            raise MalformedPickle(f"{error} at byte {self.offset}") from error
        raise PickleLimitExceeded(f"more than {self._limits.operations:,} operations")

    def since_mark(self) -> list[Any]:
        """Pop everything since the last mark."""
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def push(self, value: Any) -> None:
        """Push a value."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Pop the last value."""
        return self._stack.pop()

    def mark(self) -> None:
        """Push a mark."""
        self._count_container()
        self._marks.append(self._stack)
        self._stack = []

    def pop_or_unmark(self) -> None:
        """Pop the last value, or the mark if none follows it."""
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._marks.pop()

    def top(self) -> Any:
        """Return the last value."""
        return self._stack[-1]

    def put(self, key: int) -> None:
        """Store the last value in the memo."""
        if key < 0:
            raise MalformedPickle(f"reference {key} is negative")
        self._remember(key, self._stack[-1])

    def memoize(self) -> None:
        """Store the last value in the memo under the next free number."""
        self._count_container()
        self._remember(len(self._memo), self._stack[-1])

    def _remember(self, key: int, value: Any) -> None:
        self._memo[key] = value
        if isinstance(value, UnknownObject):
            self._memo_keys[id(value)] = key

    def get(self, key: int) -> None:
        """Push a value from the memo."""
        self._stack.append(self._memo[key])

    def name(self, module: object, name: object) -> None:
        """Push a name."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise MalformedPickle("a name is not made of text")
        dotted = f"{module}.{name}"
        self._stack.append(self.globals.setdefault(dotted, Global(dotted)))

    def reduce(self) -> None:
        """Replace a function and its arguments, the last two values, by the result."""
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def call(self, function: Any, args: Any) -> Any:
        """Return the value or node for the result of a call."""
        args = args if isinstance(args, tuple) else (args,)
        self.spend(sum(map(_weight, args)))
        if isinstance(function, Global):
            if function.name == NESTED_STORAGE:
                self.spend(0, _NESTED_COST)
            return construct(function.name, args, self._load_nested)
        return UnknownObject("call", (function, *args))

    def spend(self, copied: int, objects: int = 1) -> None:
        """Count new objects, and the bytes that building them may copy.

        Few operations are enough to copy one long string or list any number of times.
        """
        self._objects += objects
        self._copied += copied
        limits = self._limits
        if self._objects > limits.objects or self._copied > limits.copied_bytes:
            raise PickleLimitExceeded(f"more than {limits.objects:,} objects, or {limits.copied_bytes:,} bytes of them")

    def new_container(self, value: list[Any] | dict[Any, Any] | tuple[Any, ...]) -> None:
        """Push a list, dictionary or tuple."""
        self._count_container()
        self._stack.append(value)

    def _count_container(self) -> None:
        self._containers += 1
        if self._containers > self._limits.containers:
            raise PickleLimitExceeded(f"more than {self._limits.containers:,} lists, dictionaries and tuples")

    def new_set(self, name: str, items: list[Any]) -> None:
        """Push a set."""
        self.spend(0)
        self.push(UnknownObject(name, items=items))

    def build(self) -> None:
        """Pop a state and set it on the object below it."""
        state = self.pop()
        target = self.top()
        if isinstance(target, UnknownObject):
            target.state = state
            self._replace(target, apply_build(target))
        # Attributes of a plain dictionary, such as the `_metadata` of a state_dict, are ignored.

    def _replace(self, target: UnknownObject, result: Any) -> None:
        """Replace an object, on the stack and in the memo, now that its state is known."""
        if result is target:
            return
        self._stack[-1] = result
        key = self._memo_keys.get(id(target))
        if key is not None and self._memo.get(key) is target:
            self._memo[key] = result

    def append(self, items: list[Any]) -> None:
        """Append items to the last value."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, UnknownObject):
            target.items.extend(items)
        else:
            raise MalformedPickle(f"a {type(target).__name__} cannot be appended to")

    def set_items(self, items: list[Any]) -> None:
        """Set alternating keys and values in the last value."""
        target = self.top()
        if isinstance(target, UnknownObject):
            target = target.entries
        if not isinstance(target, dict) or len(items) % 2:
            raise MalformedPickle("keys are set in something that is no dictionary, or a key lacks its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def persist(self, key: Any) -> None:
        """Push the node for a persistent id."""
        self.push(self._persistent(key))


def _weight(part: Any) -> int:
    """Return the bytes that copying an argument may take."""
    if isinstance(part, str | bytes):
        return len(part)
    if isinstance(part, tuple):
        return 8 * len(part)
    return 100 * len(part) if isinstance(part, list | dict) else 0
