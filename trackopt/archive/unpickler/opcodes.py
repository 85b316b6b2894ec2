"""The opcodes of pickle protocols 0 to 5; those that refer to something outside of the pickle are refused."""

from __future__ import annotations

import codecs
import re
import struct
from itertools import chain
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import UnknownObject
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import PickleMachine

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_INTEGER_BYTES = 1024  # Python refuses to print what has more than 4,300 digits
_NUMBER_BYTES, _TEXT_BYTES, _TUPLE_BYTES, _TENSOR_BYTES, _ITEM_BYTES = 32, 56, 60, 400, 9  # in memory
_ENTRY_BYTES, _FIRST_ENTRY_BYTES = 60, 230  # in a dictionary
_LINE_OPERATIONS, _ITEM_OPERATIONS = 3, 3  # simple ones that take as long

_MAX_RUN = 10_000
_SMALL_NUMBER = ord("K")
_SMALL_RUN = re.compile(b"(?:K.){1,%d}" % _MAX_RUN, re.DOTALL)
_CONSTANT_RUN = re.compile(b"[N\x88\x89]{1,%d}" % _MAX_RUN)
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}


def _discard(_: object) -> None:
    """Do nothing with a value."""


def _long(machine: PickleMachine, length: int) -> None:
    machine.spend(_NUMBER_BYTES + max(0, length), 1)
    data = machine.take(length)
    if length > _MAX_INTEGER_BYTES:
        machine.push(UnknownObject(f"integer of {length} bytes"))
    else:
        machine.push(int.from_bytes(data, "little", signed=True))


def _text_integer(machine: PickleMachine) -> Any:
    line = _line(machine).strip()
    return {"00": False, "01": True}[line] if line in ("00", "01") else int(line.removesuffix("L"))


class _Text:
    """An operation that pushes text.

    Args:
        layout: Its length, as ``struct`` describes it.
    """

    def __init__(self, layout: str) -> None:
        self._length = struct.Struct(layout)

    def __call__(self, machine: PickleMachine) -> None:
        (length,) = self._length.unpack_from(machine.data, machine.position)
        start = machine.position = machine.position + self._length.size
        data = machine.data[start : start + length]
        if len(data) == length:
            machine.position = start + length
        else:
            data = machine.take(length)
        # One wide character makes all of them wide.
        machine.memory -= _TEXT_BYTES + (length if data.isascii() else 4 * length)
        machine.stack.append(data.decode("utf-8", "surrogatepass"))


def _old_string(data: bytes) -> str:
    """Decode a Python 2 string, which torch reads as text."""
    return data.decode("utf-8", "surrogateescape")


def _old_text(machine: PickleMachine, length: int) -> None:
    data = machine.take(length)
    machine.spend(_TEXT_BYTES + 4 * length)
    machine.push(_old_string(data))


def _line(machine: PickleMachine) -> str:
    machine.spend(0, _LINE_OPERATIONS)
    return machine.line()


def _line_of_text(machine: PickleMachine) -> bytes:
    line = _line(machine)
    machine.memory -= _TEXT_BYTES + 4 * len(line)
    return line.encode("utf-8", "surrogateescape")


def _bytes(machine: PickleMachine, length: int) -> None:
    data = machine.payload(length)
    machine.spend(_TEXT_BYTES + (length if isinstance(data, bytes) else _TENSOR_BYTES))
    machine.push(data)


def _quoted(machine: PickleMachine) -> str:
    line = _line_of_text(machine).strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise MalformedPickle("a string lacks its quotes")
    return _old_string(codecs.escape_decode(line[1:-1])[0])


def _raw_unicode(machine: PickleMachine) -> str:
    return _line_of_text(machine).decode("raw-unicode-escape")


def _global(machine: PickleMachine) -> None:
    machine.name(_line(machine), _line(machine))


def _object(machine: PickleMachine) -> None:
    function, *args = machine.since_mark()
    machine.push(machine.call(function, tuple(args)))


def _instance(machine: PickleMachine) -> None:
    _global(machine)
    function = machine.pop()
    machine.push(machine.call(function, tuple(machine.since_mark())))


def _new_object_with_keywords(machine: PickleMachine) -> None:
    keywords, args, function = machine.pop(), machine.pop(), machine.pop()
    result = machine.call(function, args)
    if keywords:
        result = UnknownObject(repr(function), tuple(args) if isinstance(args, tuple) else (args,), state=keywords)
    machine.push(result)


def _dictionary(machine: PickleMachine) -> None:
    items = machine.since_mark()
    machine.new_container({})
    machine.set_items(items)


def _tuple(machine: PickleMachine, length: int) -> None:
    stack = machine.stack
    value = tuple(stack[-length:])
    if len(value) < length:
        raise IndexError
    del stack[-length:]
    machine.memory -= _TUPLE_BYTES
    stack.append(value)


def _one_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    target = machine.stack[-1]
    if type(key) is str and type(target) is dict:
        machine.memory -= _ENTRY_BYTES if target else _FIRST_ENTRY_BYTES
        target[key] = value
    else:
        machine.spend(0, _ITEM_OPERATIONS)
        machine.set_items([key, value])


def _name_from_stack(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _append_one(machine: PickleMachine) -> None:
    value = machine.pop()
    target = machine.stack[-1]
    if type(target) is list:
        machine.memory -= _ITEM_BYTES
        target.append(value)
    else:
        machine.append([value])


def _refuse(what: str) -> Callable[[PickleMachine], None]:
    def operation(_: PickleMachine) -> None:
        raise MalformedPickle(f"{what}, which no checkpoint uses")

    return operation


_U1, _U2, _U4, _U8 = (struct.Struct(f"<{kind}") for kind in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


class _Numbers:
    """An operation that pushes a number, and all numbers of the same kind that follow it.

    A list of a million numbers has a million such operations, which one regular expression finds.

    Args:
        code: The opcode.
        layout: The opcode and its number, as ``struct`` describes them.
    """

    def __init__(self, code: str, layout: str) -> None:
        self._code = ord(code)
        self._struct = struct.Struct(layout)
        self._number = struct.Struct(layout.replace("x", ""))
        operation = b"(?:%b.{%d})" % (code.encode(), self._number.size)
        self._run = re.compile(operation + b"{2,%d}" % _MAX_RUN, re.DOTALL)

    def __call__(self, machine: PickleMachine) -> None:
        start = machine.position
        data, length = machine.data, self._number.size
        if data[start + length] == self._code and (run := self._run.match(data, start - 1)):
            machine.position = run.end()
            numbers = chain.from_iterable(self._struct.iter_unpack(run[0]))
            machine.push_all(numbers, _NUMBER_BYTES, len(run[0]) // (length + 1))
            return
        machine.memory -= _NUMBER_BYTES
        machine.position = start + length
        machine.stack.append(self._number.unpack_from(data, start)[0])


def _small_number(machine: PickleMachine) -> None:
    """Push a number of one byte, and those that follow."""
    data, position = machine.data, machine.position
    if data[position + 1] == _SMALL_NUMBER:
        numbers = _run(machine, _SMALL_RUN)[1::2]
        machine.push_all(numbers, 0, len(numbers))
    else:
        machine.position = position + 1
        machine.stack.append(data[position])


def _constant(machine: PickleMachine) -> None:
    """Push a constant, and those that follow."""
    data, position = machine.data, machine.position
    if data[position] in _CONSTANTS:
        codes = _run(machine, _CONSTANT_RUN)
        machine.push_all(map(_CONSTANTS.__getitem__, codes), 0, len(codes))
    else:
        machine.stack.append(_CONSTANTS[data[position - 1]])


def _put_short(machine: PickleMachine) -> None:
    """Store the last value in the memo under a number of one byte."""
    key = machine.data[machine.position]
    machine.position += 1
    machine.put(key)


def _get_short(machine: PickleMachine) -> None:
    """Push a value from the memo by a number of one byte."""
    key = machine.data[machine.position]
    machine.position += 1
    machine.get(key)


def _run(machine: PickleMachine, pattern: re.Pattern[bytes]) -> bytes:
    """Read the operations that a pattern matches, from the current one on."""
    run = pattern.match(machine.data, machine.position - 1)
    if run is None:
        raise MalformedPickle(f"it ends at byte {machine.offset}")
    machine.position = run.end()
    return run[0]


_BY_CHARACTER: dict[str, Callable[[PickleMachine], None]] = {
    # structure
    "(": PickleMachine.mark,
    "0": PickleMachine.pop_or_unmark,
    "1": lambda m: _discard(m.since_mark()),
    "2": lambda m: m.push(m.top()),
    "\x80": lambda m: _discard(m.take(1)),
    "\x95": lambda m: _discard(m.take(8)),  # a frame: its size only says how to read ahead
    # references
    "p": lambda m: m.put(int(m.line())),
    "q": _put_short,
    "r": lambda m: m.put(m.number(_U4)),
    "\x94": PickleMachine.memoize,
    "g": lambda m: m.get(int(m.line())),
    "h": _get_short,
    "j": lambda m: m.get(m.number(_U4)),
    # constants and numbers
    "N": _constant,
    "\x88": _constant,
    "\x89": _constant,
    "I": lambda m: m.push(_text_integer(m)),
    "L": lambda m: m.push(_text_integer(m)),
    "F": lambda m: m.push(float(_line(m))),
    "J": _Numbers("J", "<xi"),
    "K": _small_number,
    "M": _Numbers("M", "<xH"),
    "G": _Numbers("G", ">xd"),
    "\x8a": lambda m: _long(m, m.number(_U1)),
    "\x8b": lambda m: _long(m, m.number(_I4)),
    # text and bytes
    "S": lambda m: m.push(_quoted(m)),
    "T": lambda m: _old_text(m, m.number(_I4)),
    "U": lambda m: _old_text(m, m.number(_U1)),
    "V": lambda m: m.push(_raw_unicode(m)),
    "X": _Text("<I"),
    "\x8c": _Text("<B"),
    "\x8d": _Text("<Q"),
    "B": lambda m: _bytes(m, m.number(_U4)),
    "C": lambda m: _bytes(m, m.number(_U1)),
    "\x8e": lambda m: _bytes(m, m.number(_U8)),
    "\x96": lambda m: _bytes(m, m.number(_U8)),  # a bytearray
    # containers
    ")": lambda m: m.push(()),
    "t": lambda m: m.new_container(tuple(m.since_mark())),
    "\x85": lambda m: _tuple(m, 1),
    "\x86": lambda m: _tuple(m, 2),
    "\x87": lambda m: _tuple(m, 3),
    "]": lambda m: m.new_container([]),
    "l": lambda m: m.new_container(m.since_mark()),
    "a": _append_one,
    "e": lambda m: m.append(m.since_mark()),
    "}": lambda m: m.new_container({}),
    "d": _dictionary,
    "s": _one_item,
    "u": lambda m: m.set_items(m.since_mark()),
    "\x8f": lambda m: m.new_set("builtins.set", []),
    "\x90": lambda m: m.append(m.since_mark()),
    "\x91": lambda m: m.new_set("builtins.frozenset", m.since_mark()),
    # objects
    "c": _global,
    "\x93": _name_from_stack,
    "R": PickleMachine.reduce,
    "\x81": PickleMachine.reduce,
    "\x92": _new_object_with_keywords,
    "i": _instance,
    "o": _object,
    "b": PickleMachine.build,
    "P": lambda m: m.persist(m.line()),
    "Q": lambda m: m.persist(m.pop()),
    "\x82": _refuse("it uses an extension code"),
    "\x83": _refuse("it uses an extension code"),
    "\x84": _refuse("it uses an extension code"),
    "\x97": _refuse("it refers to data outside of itself"),
    "\x98": lambda _: None,  # a buffer made read-only
}
OPERATIONS = {ord(code): operation for code, operation in _BY_CHARACTER.items()}
