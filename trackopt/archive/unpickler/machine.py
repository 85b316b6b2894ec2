"""A pickle machine that builds only plain values and nodes.

A name in the file is never imported and never called: it becomes a `Global`, and a call of it is described by
`trackopt.archive.unpickler.constructors`. The cost of a hostile pickle is bounded while it runs, in operations, in
memory and in depth; after it, in expanded size. The opcodes are in `trackopt.archive.unpickler.opcodes`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, Tensor, UnknownObject
from trackopt.archive.unpickler.buffer import BufferedReader
from trackopt.archive.unpickler.constructors import NESTED_STORAGE, construct
from trackopt.archive.unpickler.limits import (
    MAX_DEPTH,
    Limits,
    MalformedPickle,
    PickleLimitExceeded,
    check_limits,
    checked_key,
)
from trackopt.archive.unpickler.numpy_constructors import apply_build
from trackopt.archive.unpickler.tensor_constructors import CALLS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from trackopt.archive.io.byte_ranges import ByteRange

_STOP = ord(".")
_STRIDE = 1000  # operations between two checks of the limits
_MAX_MARKS = 2 * MAX_DEPTH  # a list in a dictionary opens one for each
# What operations cost: as many simple ones as take the same time, and the bytes of what they build.
_CALL_OPERATIONS, _TENSOR_OPERATIONS, _NESTED_OPERATIONS, _KEY_OPERATIONS, _COLLISION_OPERATIONS = 4, 20, 400, 20, 500
_CALL_BYTES, _TENSOR_BYTES, _CONTAINER_BYTES, _FIRST_ENTRY_BYTES = 250, 400, 80, 170
_ITEM_BYTES, _ENTRY_BYTES, _SPARSE_BYTES = 9, 60, 110
_UNCERTAIN_PAIRS = 2  # at the end of a truncated pickle: up to three parts of a tuple have no mark
_POINTER_BYTES = 8
_LARGE_BATCH = 10_000  # before it is in its list, it takes memory of its own
_MAX_HASH = 1 << 60  # integers below it are their own hashes


class PickleMachine(BufferedReader):
    """A machine that runs one pickle.

    Args:
        data: The bytes, or the range to read them from; the pickle may end before they do.
        persistent: Returns the node for a persistent id.
        load_nested: Returns the node for a storage that was pickled as a whole file.
        limits: What reading it may take.

    Attributes:
        globals: Every name that the pickle refers to, in order.
        stack: The values since the last mark.
        memory: The bytes that further values may take. It is checked at intervals, so that a short operation may
            subtract what it takes; one that takes much calls `spend`.
    """

    def __init__(
        self,
        data: bytes | ByteRange,
        persistent: Callable[[Any], Any],
        load_nested: Callable[[ByteRange], Any],
        limits: Limits,
    ) -> None:
        super().__init__(data, limits.memory)
        self._limits = limits
        self.globals: dict[str, Global] = {}
        self._persistent = persistent
        self._load_nested = load_nested
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: list[Any] = []
        self._sparse_memo: dict[int, Any] = {}  # by numbers that were not the next one
        self._memo_keys: dict[int, int] = {}
        self._operations = limits.operations
        self.memory = limits.memory
        self._keys: dict[int, Any] = {}  # by hash, other than text

    def run(self, operations: Mapping[int, Callable[[PickleMachine], None]]) -> Any:
        """Run the pickle; return the object that it describes.

        Args:
            operations: The function of each opcode.

        Raises:
            MalformedPickle: It is malformed, or it exceeds a limit.
        """
        try:
            stride = min(_STRIDE, self._limits.operations)
            while True:
                for _ in range(stride):
                    if self.position > self.low_watermark:
                        self.refill()
                    code = self.data[self.position]
                    self.position += 1
                    if code == _STOP:
                        self.spend(0)
                        return check_limits(self.stack.pop(), self._limits.nodes, self.memory)
                    operations[code](self)
                self.spend(0, stride)
        except KeyError as error:
            raise MalformedPickle(f"unknown operation or missing reference {error} at byte {self.offset}") from error
        except IndexError as error:
            raise MalformedPickle(f"it ends, or pops from an empty stack, at byte {self.offset}") from error
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error, RecursionError) as error:
            raise MalformedPickle(f"{error} at byte {self.offset}") from error

    def incomplete_dictionary(self) -> dict[Any, Any]:
        """Return the outermost dictionary, with the tensors that wait to be set in it and in the last one inside it.

        The mark after a dictionary that is the value of a text key is that of its entries. Other values may be parts
        of a tuple that was not finished, as may be the last tensors; each is replaced by an `UnknownObject`.
        """
        levels = [*self._marks, self.stack]
        if not levels[0] or not isinstance(levels[0][0], dict):
            return {}
        root = target = levels[0][0]
        levels[0] = levels[0][1:]
        for items, rest in zip(levels, [*levels[1:], None], strict=True):
            pairs = list(zip(items[::2], items[1::2], strict=False))
            certain = len(pairs) - (1 if rest is not None else _UNCERTAIN_PAIRS)
            for index, (key, value) in enumerate(pairs):
                if not isinstance(key, str):
                    return root
                is_tensor = isinstance(value, Tensor) and index < certain
                target[key] = value if is_tensor else UnknownObject("incomplete")
            if items and (rest is None or len(items) % 2 or not isinstance(items[-1], dict)):
                return root
            if items:
                target[items[-2]] = items[-1]
                target = items[-1]
        return root

    def since_mark(self) -> list[Any]:
        """Pop everything since the last mark."""
        items = self.stack
        self.stack = self._marks.pop()
        return items

    def push(self, value: Any) -> None:
        """Push a value."""
        self.stack.append(value)

    def push_all(self, values: Iterable[Any], memory: int, count: int) -> None:
        """Push many plain values, which take ``memory`` bytes each."""
        waiting = _POINTER_BYTES * count if len(self.stack) > _LARGE_BATCH else 0
        self.spend(memory * count + waiting, 1 + (count >> 4))
        self.stack.extend(values)

    def pop(self) -> Any:
        """Pop the last value."""
        return self.stack.pop()

    def mark(self) -> None:
        """Push a mark."""
        if len(self._marks) >= _MAX_MARKS:
            raise PickleLimitExceeded(f"it is nested more than {MAX_DEPTH} levels deep")
        self._marks.append(self.stack)
        self.stack = []

    def pop_or_unmark(self) -> None:
        """Pop the last value, or the mark if none follows it."""
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self._marks.pop()

    def top(self) -> Any:
        """Return the last value."""
        return self.stack[-1]

    def put(self, key: int) -> None:
        """Store the last value in the memo."""
        value = self.stack[-1]
        if key == len(self._memo):
            self._memo.append(value)
            self.memory -= _ITEM_BYTES
        elif 0 <= key < len(self._memo):
            self._memo[key] = value
        elif key < 0:
            raise MalformedPickle(f"reference {key} is negative")
        else:
            self.spend(_SPARSE_BYTES)
            self._sparse_memo[key] = value
        if isinstance(value, UnknownObject):
            self._memo_keys[id(value)] = key

    def memoize(self) -> None:
        """Store the last value in the memo under the next free number."""
        self.put(len(self._memo) + len(self._sparse_memo))

    def get(self, key: int) -> None:
        """Push a value from the memo."""
        self.stack.append(self._recall(key))

    def _recall(self, key: int) -> Any:
        return self._memo[key] if 0 <= key < len(self._memo) else self._sparse_memo[key]

    def name(self, module: object, name: object) -> None:
        """Push a name."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise MalformedPickle("a name is not made of text")
        dotted = f"{module}.{name}"
        if not dotted.isascii():
            dotted.encode()  # raises UnicodeEncodeError for what was no UTF-8: torch refuses that, too
        self.stack.append(self.globals.setdefault(dotted, Global(dotted)))

    def reduce(self) -> None:
        """Replace a function and its arguments, the last two values, by the result."""
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def call(self, function: Any, args: Any) -> Any:
        """Return the value or node for the result of a call."""
        args = args if isinstance(args, tuple) else (args,)
        memory = sum(map(_weight, args))
        if not isinstance(function, Global):
            self.spend(memory + _CALL_BYTES, _CALL_OPERATIONS)
            return UnknownObject("call", (function, *args))
        if function.name in CALLS:
            self.spend(memory + _TENSOR_BYTES, _TENSOR_OPERATIONS)
        else:
            is_nested = function.name == NESTED_STORAGE
            self.spend(memory + _CALL_BYTES, _NESTED_OPERATIONS if is_nested else _CALL_OPERATIONS)
        return construct(function.name, args, self._load_nested)

    def spend(self, memory: int, operations: int = 0) -> None:
        """Count the memory that new values take, and operations.

        Few operations are enough to copy one long string or list any number of times.
        """
        self.memory -= memory
        self._operations -= operations
        if self.memory < 0 or len(self.stack) > self._limits.memory >> 5:
            raise PickleLimitExceeded(f"its values would take more than {self._limits.memory >> 20:,} MiB of memory")
        if self._operations <= 0:
            raise PickleLimitExceeded(f"more than {self._limits.operations:,} operations")

    def new_container(self, value: list[Any] | dict[Any, Any] | tuple[Any, ...]) -> None:
        """Push a list, dictionary or tuple."""
        self.memory -= _CONTAINER_BYTES + _ITEM_BYTES * len(value)
        self.stack.append(value)

    def new_set(self, name: str, items: list[Any]) -> None:
        """Push a set."""
        self.spend(_CALL_BYTES, _CALL_OPERATIONS)
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
        self.stack[-1] = result
        key = self._memo_keys.get(id(target))
        if key is not None and self._recall(key) is target:
            (self._memo if key < len(self._memo) else self._sparse_memo)[key] = result

    def append(self, items: list[Any]) -> None:
        """Append items to the last value."""
        target = self.top()
        self.memory -= _ITEM_BYTES * len(items) * (2 if len(items) > _LARGE_BATCH else 1)
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
        self.memory -= _ENTRY_BYTES * len(items) // 2 + (0 if target else _FIRST_ENTRY_BYTES)
        keys = items[::2]
        if not _are_plain(keys):
            for key in keys:
                self._spend_key(checked_key(key))
        target.update(zip(keys, items[1::2], strict=True))

    def _spend_key(self, key: Any) -> None:
        """Count the time that hashing a key takes; many keys of one hash make a dictionary slow."""
        collides = self._keys.setdefault(hash(key), key) != key
        self.spend(_SPARSE_BYTES, _COLLISION_OPERATIONS if collides else _KEY_OPERATIONS)

    def persist(self, key: Any) -> None:
        """Push the node for a persistent id."""
        self.spend(_CALL_BYTES, _CALL_OPERATIONS)
        self.push(self._persistent(key))


def _are_plain(keys: list[Any]) -> bool:
    """Return whether all keys are text, or all are numbers that are their own hashes."""
    kinds = set(map(type, keys))
    return kinds <= {str} or (kinds == {int} and min(keys) > -_MAX_HASH and max(keys) < _MAX_HASH)


def _weight(part: Any) -> int:
    """Return the bytes that copying an argument may take."""
    if isinstance(part, str | bytes):
        return len(part)
    if isinstance(part, tuple):
        return 8 * len(part)
    return 100 * len(part) if isinstance(part, list | dict) else 0
