"""A pickle machine that builds nothing but plain values and nodes.

Its opcodes, all of protocols 0 to 5, are in `trackopt.archive.unpickler.opcodes`. A name in the file is never
imported and never called: it becomes a `Global`, and calling one is left to `trackopt.archive.unpickler.constructors`,
which knows a few dozen names and describes the rest. What a hostile pickle can cost is bounded: in
operations, in bytes and, after it has run, in depth and in size once written out.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, UnknownObject
from trackopt.archive.unpickler.buffer import MAX_COPIED, BufferedReader
from trackopt.archive.unpickler.limits import MalformedPickle, check_limits, checked_key
from trackopt.archive.unpickler.numpy_constructors import built

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trackopt.archive.io.byte_ranges import ByteRange

MAX_OPERATIONS = 3_000_000
MAX_OBJECTS = 600_000
_STOP = ord(".")
#: What a storage calls that is pickled by itself: its argument is a whole file.
EMBEDDED = "torch.storage._load_from_bytes"
_EMBEDDED_COST = 50


class PickleMachine(BufferedReader):
    """Runs one pickle.

    Args:
        data: The bytes, or where to read them as they are needed; the pickle may end before they do.
        call: Told a `Global` and the arguments, returns what stands for the result.
        persistent: Told a persistent id, returns what stands for the object.

    Attributes:
        globals: Every name that the pickle refers to, in order.
    """

    def __init__(
        self,
        data: bytes | ByteRange,
        call: Callable[[str, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
        position: int = 0,
    ) -> None:
        super().__init__(data, position)
        self.globals: dict[str, Global] = {}
        self._call = call
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._places: dict[int, int] = {}
        self._objects = 0
        self._copied = 0

    def run(self, operations: Mapping[int, Callable[[PickleMachine], None]], limit: int = MAX_OPERATIONS) -> Any:
        """The object that the pickle describes.

        Args:
            operations: What each opcode does.
            limit: How many of them it may take.

        Raises:
            Broken: It is malformed, or it costs more than a checkpoint's may.
        """
        try:
            for _ in range(limit):
                if self.position > self.low_watermark:
                    self.refill()
                code = self.data[self.position]
                self.position += 1
                if code == _STOP:
                    return check_limits(self._stack.pop())
                operations[code](self)
        except KeyError as error:
            raise MalformedPickle(f"unknown operation or missing reference {error} at byte {self.offset}") from error
        except IndexError as error:
            raise MalformedPickle(f"it ends, or takes more than was put in, at byte {self.offset}") from error
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error, RecursionError) as error:
            raise MalformedPickle(f"{error} at byte {self.offset}") from error
        raise MalformedPickle(f"more than {limit:,} operations")

    def since_mark(self) -> list[Any]:
        """What was put in since the last mark."""
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def push(self, value: Any) -> None:
        """Put a value in."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the last value out."""
        return self._stack.pop()

    def mark(self) -> None:
        """Begin a group."""
        self._marks.append(self._stack)
        self._stack = []

    def pop_or_unmark(self) -> None:
        """Drop the last value, or the empty group."""
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._marks.pop()

    def top(self) -> Any:
        """The last value."""
        return self._stack[-1]

    def put(self, key: int) -> None:
        """Remember the last value."""
        if key < 0:
            raise MalformedPickle(f"reference {key} is negative")
        self._remember(key, self._stack[-1])

    def memoize(self) -> None:
        """Remember the last value under the next free number."""
        self._remember(len(self._memo), self._stack[-1])

    def _remember(self, key: int, value: Any) -> None:
        self._memo[key] = value
        if isinstance(value, UnknownObject):
            self._places[id(value)] = key

    def get(self, key: int) -> None:
        """Put in what was remembered."""
        self._stack.append(self._memo[key])

    def name(self, module: object, name: object) -> None:
        """Put a name in."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise MalformedPickle("a name is not made of text")
        dotted = f"{module}.{name}"
        self._stack.append(self.globals.setdefault(dotted, Global(dotted)))

    def reduce(self) -> None:
        """Call the last but one value with the last one."""
        args, function = self.pop(), self.pop()
        self.push(self.called(function, args))

    def called(self, function: Any, args: Any) -> Any:
        """What stands for the result of a call."""
        args = args if isinstance(args, tuple) else (args,)
        self.spend(sum(map(_weight, args)))
        if isinstance(function, Global):
            if function.name == EMBEDDED:
                self.spend(0, _EMBEDDED_COST)
            return self._call(function.name, args)
        return UnknownObject("call", (function, *args))

    def spend(self, copied: int, objects: int = 1) -> None:
        """Count new objects, and the bytes that making it may copy.

        A few operations can copy one long string or list any number of times.
        """
        self._objects += objects
        self._copied += copied
        if self._objects > MAX_OBJECTS or self._copied > MAX_COPIED:
            raise MalformedPickle(f"more than {MAX_OBJECTS:,} objects, or {MAX_COPIED:,} bytes of them")

    def new_set(self, name: str, items: list[Any]) -> None:
        """Put a set in."""
        self.spend(0)
        self.push(UnknownObject(name, items=items))

    def build(self) -> None:
        """Give the last but one value its state."""
        state = self.pop()
        target = self.top()
        if isinstance(target, UnknownObject):
            target.state = state
            self._replace(target, built(target))
        # Attributes of a plain dictionary, such as a state_dict's `_metadata`, are no entries of it.

    def _replace(self, target: UnknownObject, result: Any) -> None:
        """Let something else stand for an object now that its state is known."""
        if result is target:
            return
        self._stack[-1] = result
        key = self._places.get(id(target))
        if key is not None and self._memo.get(key) is target:
            self._memo[key] = result

    def append(self, items: list[Any]) -> None:
        """Append to the last value."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, UnknownObject):
            target.items.extend(items)
        else:
            raise MalformedPickle(f"a {type(target).__name__} cannot be appended to")

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, one after the other, in the last value."""
        target = self.top()
        if isinstance(target, UnknownObject):
            target = target.entries
        if not isinstance(target, dict) or len(items) % 2:
            raise MalformedPickle("keys are set in something that is no dictionary, or one lacks its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def persist(self, key: Any) -> None:
        """Put in what a persistent id stands for."""
        self.push(self._persistent(key))


def _weight(part: Any) -> int:
    """Bytes that copying an argument may take."""
    if isinstance(part, str | bytes):
        return len(part)
    if isinstance(part, tuple):
        return 8 * len(part)
    return 100 * len(part) if isinstance(part, list | dict) else 0
