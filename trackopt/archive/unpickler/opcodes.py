"""The opcodes of pickle protocols 0 to 5; those that refer to something outside of the pickle are refused."""

from __future__ import annotations

import codecs
import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import UnknownObject
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import PickleMachine

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_INTEGER_BYTES = 1024  # Python refuses to print what has more than 4,300 digits


def _discard(_: object) -> None:
    """Do nothing with a value."""


def _integer(data: bytes) -> Any:
    if len(data) > _MAX_INTEGER_BYTES:
        return UnknownObject(f"integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _text_integer(machine: PickleMachine) -> Any:
    line = machine.line().strip()
    return {"00": False, "01": True}[line] if line in ("00", "01") else int(line.removesuffix("L"))


def _text(machine: PickleMachine, length: int) -> str:
    data = machine.take(length)
    if not data.isascii():
        machine.spend(4 * length)  # one wide character makes all of them wide
    return data.decode("utf-8", "surrogatepass")


def _old_string(data: bytes) -> str:
    """Decode a Python 2 string, which torch reads as text."""
    return data.decode("utf-8", "surrogateescape")


def _quoted(machine: PickleMachine) -> str:
    line = machine.line().strip()
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
        raise MalformedPickle("a string lacks its quotes")
    return _old_string(codecs.escape_decode(line[1:-1].encode("utf-8", "surrogateescape"))[0])


def _raw_unicode(machine: PickleMachine) -> str:
    return machine.line().encode("utf-8", "surrogateescape").decode("raw-unicode-escape")


def _object(machine: PickleMachine) -> None:
    function, *args = machine.since_mark()
    machine.push(machine.call(function, tuple(args)))


def _instance(machine: PickleMachine) -> None:
    machine.name(machine.line(), machine.line())
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
    machine.new_container(tuple(reversed([machine.pop() for _ in range(length)])))


def _one_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _name_from_stack(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _append_one(machine: PickleMachine) -> None:
    value = machine.pop()
    machine.append([value])


def _refuse(what: str) -> Callable[[PickleMachine], None]:
    def operation(_: PickleMachine) -> None:
        raise MalformedPickle(f"{what}, which no checkpoint uses")

    return operation


_U1, _U2, _U4, _U8 = (struct.Struct(f"<{kind}") for kind in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")

OPERATIONS: dict[int, Callable[[PickleMachine], None]] = {
    ord(code): operation
    for code, operation in {
        # structure
        "(": PickleMachine.mark,
        "0": PickleMachine.pop_or_unmark,
        "1": lambda m: _discard(m.since_mark()),
        "2": lambda m: m.push(m.top()),
        "\x80": lambda m: _discard(m.take(1)),
        "\x95": lambda m: _discard(m.take(8)),  # a frame: its size only says how to read ahead
        # references
        "p": lambda m: m.put(int(m.line())),
        "q": lambda m: m.put(m.number(_U1)),
        "r": lambda m: m.put(m.number(_U4)),
        "\x94": PickleMachine.memoize,
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
        "B": lambda m: m.push(m.payload(m.number(_U4))),
        "C": lambda m: m.push(m.take(m.number(_U1))),
        "\x8e": lambda m: m.push(m.payload(m.number(_U8))),
        "\x96": lambda m: m.push(m.payload(m.number(_U8))),  # a bytearray
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
        "c": lambda m: m.name(m.line(), m.line()),
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
    }.items()
}
