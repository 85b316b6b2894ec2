"""A pickle machine that builds nothing but plain values and nodes.

It knows every opcode of protocols 0 to 5. A name in the file is never imported and never called: it becomes
a `Global`, and calling one is left to `trackopt.archive.rebuild`, which knows a few dozen names and
describes the rest. What a hostile pickle can cost is bounded: in operations, in bytes and, after it has
run, in depth and in size once written out.
"""

from __future__ import annotations

import codecs
import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.bounds import Broken, bounded, checked_key
from trackopt.archive.nodes import Global, Opaque

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_OPERATIONS = 3_000_000
MAX_OBJECTS = 600_000
MAX_COPIED = 64 << 20
_MAX_INTEGER = 1024  # bytes; Python refuses to print what has more than 4,300 digits


class Machine:
    """Runs one pickle.

    Args:
        data: The bytes; the pickle may end before they do.
        call: Told a `Global` and the arguments, returns what stands for the result.
        persistent: Told a persistent id, returns what stands for the object.

    Attributes:
        position: Where the next byte is read; behind the pickle once it has run.
        globals: Every name that the pickle refers to, in order.
    """

    def __init__(
        self,
        data: bytes,
        call: Callable[[str, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
        position: int = 0,
    ) -> None:
        self.data = data
        self.position = position
        self.globals: dict[str, Global] = {}
        self._call = call
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._objects = 0
        self._copied = 0

    def run(self) -> Any:
        """The object that the pickle describes.

        Raises:
            Broken: It is malformed, or it costs more than a checkpoint's may.
        """
        table = _OPERATIONS
        try:
            for _ in range(MAX_OPERATIONS):
                code = self.data[self.position]
                self.position += 1
                if code == _STOP:
                    return bounded(self._stack.pop())
                table[code](self)
        except KeyError as error:
            raise Broken(f"unknown operation or missing reference {error} at byte {self.position}") from error
        except IndexError as error:
            raise Broken(f"it ends, or takes more than was put in, at byte {self.position}") from error
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error, RecursionError) as error:
            raise Broken(f"{error} at byte {self.position}") from error
        raise Broken(f"more than {MAX_OPERATIONS:,} operations")

    def take(self, length: int) -> bytes:
        """The next bytes."""
        end = self.position + length
        if length < 0 or end > len(self.data):
            raise Broken(f"{length} bytes are announced at byte {self.position}, there are fewer")
        data = self.data[self.position : end]
        self.position = end
        return data

    def number(self, kind: struct.Struct) -> Any:
        """The next number of a fixed size."""
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def line(self) -> str:
        """The next text up to a newline."""
        end = self.data.index(b"\n", self.position)
        data = self.data[self.position : end]
        self.position = end + 1
        return data.decode("utf-8", "surrogateescape")

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
            raise Broken(f"reference {key} is negative")
        self._memo[key] = self._stack[-1]

    def memoize(self) -> None:
        """Remember the last value under the next free number."""
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, key: int) -> None:
        """Put in what was remembered."""
        self._stack.append(self._memo[key])

    def name(self, module: object, name: object) -> None:
        """Put a name in."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Broken("a name is not made of text")
        dotted = f"{module}.{name}"
        self._stack.append(self.globals.setdefault(dotted, Global(dotted)))

    def reduce(self) -> None:
        """Call the last but one value with the last one."""
        args, function = self.pop(), self.pop()
        self.push(self.called(function, args))

    def called(self, function: Any, args: Any) -> Any:
        """What stands for the result of a call."""
        args = args if isinstance(args, tuple) else (args,)
        self.spend(
            sum(
                len(part) if isinstance(part, str | bytes) else 100 * len(part)
                for part in args
                if _copies(part)
            )
        )
        if isinstance(function, Global):
            return self._call(function.name, args)
        return Opaque("call", (function, *args))

    def spend(self, copied: int) -> None:
        """Count a new object, and the bytes that making it may copy.

        A few operations can copy one long string or list any number of times.
        """
        self._objects += 1
        self._copied += copied
        if self._objects > MAX_OBJECTS or self._copied > MAX_COPIED:
            raise Broken(f"more than {MAX_OBJECTS:,} objects, or {MAX_COPIED:,} bytes of them")

    def new_set(self) -> None:
        """Put an empty set in."""
        self.spend(0)
        self.push(Opaque("builtins.set"))

    def build(self) -> None:
        """Give the last but one value its state."""
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque):
            target.state = state
        # Attributes of a plain dictionary, such as a state_dict's `_metadata`, are no entries of it.

    def append(self, items: list[Any]) -> None:
        """Append to the last value."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Opaque):
            target.items.extend(items)
        else:
            raise Broken(f"a {type(target).__name__} cannot be appended to")

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, one after the other, in the last value."""
        target = self.top()
        if isinstance(target, Opaque):
            target = target.entries
        if not isinstance(target, dict) or len(items) % 2:
            raise Broken("keys are set in something that is no dictionary, or one lacks its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def persist(self, key: Any) -> None:
        """Put in what a persistent id stands for."""
        self.push(self._persistent(key))


def void(_: object) -> None:
    """Drop a value."""


def _integer(data: bytes) -> Any:
    if len(data) > _MAX_INTEGER:
        return Opaque(f"integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _text_integer(machine: Machine) -> Any:
    line = machine.line().strip()
    return {"00": False, "01": True}[line] if line in ("00", "01") else int(line.removesuffix("L"))


def _copies(part: Any) -> bool:
    return isinstance(part, str | bytes | list | dict)


def _text(machine: Machine, length: int) -> str:
    data = machine.take(length)
    if not data.isascii():
        machine.spend(4 * length)  # one wide character makes all of them wide
    return data.decode("utf-8", "surrogatepass")


def _old_string(data: bytes) -> str:
    """A Python 2 string: what torch reads as text."""
    return data.decode("utf-8", "surrogateescape")


def _quoted(machine: Machine) -> str:
    line = machine.line().strip()
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
        raise Broken("a string lacks its quotes")
    return _old_string(codecs.escape_decode(line[1:-1].encode("utf-8", "surrogateescape"))[0])


def _raw_unicode(machine: Machine) -> str:
    return machine.line().encode("utf-8", "surrogateescape").decode("raw-unicode-escape")


def _object(machine: Machine) -> None:
    function, *args = machine.since_mark()
    machine.push(machine.called(function, tuple(args)))


def _instance(machine: Machine) -> None:
    machine.name(machine.line(), machine.line())
    function = machine.pop()
    machine.push(machine.called(function, tuple(machine.since_mark())))


def _new_object_with_keywords(machine: Machine) -> None:
    keywords, args, function = machine.pop(), machine.pop(), machine.pop()
    result = machine.called(function, args)
    if keywords:
        result = Opaque(repr(function), tuple(args) if isinstance(args, tuple) else (args,), state=keywords)
    machine.push(result)


def _dictionary(machine: Machine) -> None:
    items = machine.since_mark()
    machine.push({})
    machine.set_items(items)


def _tuple(machine: Machine, length: int) -> None:
    machine.push(tuple(reversed([machine.pop() for _ in range(length)])))


def _one_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _name_from_stack(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _append_one(machine: Machine) -> None:
    value = machine.pop()
    machine.append([value])


def _refuse(what: str) -> Callable[[Machine], None]:
    def operation(_: Machine) -> None:
        raise Broken(f"{what}, which no checkpoint uses")

    return operation


_STOP = ord(".")
_U1, _U2, _U4, _U8 = (struct.Struct(f"<{kind}") for kind in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")

_OPERATIONS: dict[int, Callable[[Machine], None]] = {
    ord(code): operation
    for code, operation in {
        # structure
        "(": Machine.mark,
        "0": Machine.pop_or_unmark,
        "1": lambda m: void(m.since_mark()),
        "2": lambda m: m.push(m.top()),
        "\x80": lambda m: void(m.take(1)),
        "\x95": lambda m: void(m.take(8)),  # a frame: its size only says how to read ahead
        # references
        "p": lambda m: m.put(int(m.line())),
        "q": lambda m: m.put(m.number(_U1)),
        "r": lambda m: m.put(m.number(_U4)),
        "\x94": Machine.memoize,
        "g": lambda m: m.get(int(m.line())),
        "h": lambda m: m.get(m.number(_U1)),
        "j": lambda m: m.get(m.number(_U4)),
        # constants and numbers
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "I": lambda m: m.push(_text_integer(m)),
        "L": lambda m: m.push(_text_integer(m)),
        "F": lambda m: m.push(float(m.line())),
        "J": lambda m: m.push(m.number(_I4)),
        "K": lambda m: m.push(m.number(_U1)),
        "M": lambda m: m.push(m.number(_U2)),
        "G": lambda m: m.push(m.number(_F8)),
        "\x8a": lambda m: m.push(_integer(m.take(m.number(_U1)))),
        "\x8b": lambda m: m.push(_integer(m.take(m.number(_I4)))),
        # text and bytes
        "S": lambda m: m.push(_quoted(m)),
        "T": lambda m: m.push(_old_string(m.take(m.number(_I4)))),
        "U": lambda m: m.push(_old_string(m.take(m.number(_U1)))),
        "V": lambda m: m.push(_raw_unicode(m)),
        "X": lambda m: m.push(_text(m, m.number(_U4))),
        "\x8c": lambda m: m.push(_text(m, m.number(_U1))),
        "\x8d": lambda m: m.push(_text(m, m.number(_U8))),
        "B": lambda m: m.push(m.take(m.number(_U4))),
        "C": lambda m: m.push(m.take(m.number(_U1))),
        "\x8e": lambda m: m.push(m.take(m.number(_U8))),
        "\x96": lambda m: m.push(m.take(m.number(_U8))),  # a bytearray
        # containers
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": lambda m: _tuple(m, 1),
        "\x86": lambda m: _tuple(m, 2),
        "\x87": lambda m: _tuple(m, 3),
        "]": lambda m: m.push([]),
        "l": lambda m: m.push(m.since_mark()),
        "a": _append_one,
        "e": lambda m: m.append(m.since_mark()),
        "}": lambda m: m.push({}),
        "d": _dictionary,
        "s": _one_item,
        "u": lambda m: m.set_items(m.since_mark()),
        "\x8f": Machine.new_set,
        "\x90": lambda m: m.append(m.since_mark()),
        "\x91": lambda m: m.push(Opaque("builtins.frozenset", items=m.since_mark())),
        # objects
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": _name_from_stack,
        "R": Machine.reduce,
        "\x81": Machine.reduce,
        "\x92": _new_object_with_keywords,
        "i": _instance,
        "o": _object,
        "b": Machine.build,
        "P": lambda m: m.persist(m.line()),
        "Q": lambda m: m.persist(m.pop()),
        "\x82": _refuse("it uses an extension code"),
        "\x83": _refuse("it uses an extension code"),
        "\x84": _refuse("it uses an extension code"),
        "\x97": _refuse("it refers to data outside of itself"),
        "\x98": lambda _: None,  # a buffer made read-only
    }.items()
}
