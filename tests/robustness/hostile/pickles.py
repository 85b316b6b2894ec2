"""Pickles that no checkpoint needs: bombs, cycles, lies, and calls of what must not be called."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tests.helpers.checkpoints import zipped
from tests.robustness.hostile import Case

if TYPE_CHECKING:
    from collections.abc import Callable

CANARY = "canary-was-run"
_HEAD = b"\x80\x02"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _case(operations: bytes | Callable[[], bytes], says: str = "") -> Case:
    return Case(
        lambda path: zipped(_HEAD + (operations if isinstance(operations, bytes) else operations()), path), says
    )


def _call(name: str, argument: str) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + _text(argument) + b"\x85R."


def _inside(value: bytes) -> bytes:
    """``{"model": value}``."""
    return b"}" + _text("model") + value.removesuffix(b".") + b"s."


_TOUCH = f"touch {CANARY}"
_OPEN = f"open({CANARY!r}, 'w').close()"


def _laughs() -> bytes:
    """Thirty lists, each of which holds the one before ten times."""
    lists = b"".join(b"](" + (b"h" + bytes([i - 1])) * 10 + b"eq" + bytes([i]) for i in range(1, 30))
    return b"]q\x00" + lists + b"."


CASES: dict[str, Case] = {
    "LONG_BINPUT 2^27": _case(b"}r" + struct.pack("<I", 1 << 27) + b"."),
    "PUT 10^30": _case(b"}p" + b"1" + b"0" * 30 + b"\n."),
    "BINBYTES8 2^62": _case(b"\x8e" + struct.pack("<Q", 1 << 62) + b".", "announced"),
    "BINUNICODE8 2^62": _case(b"\x8d" + struct.pack("<Q", 1 << 62) + b".", "announced"),
    "BYTEARRAY8 2^62": _case(b"\x96" + struct.pack("<Q", 1 << 62) + b".", "announced"),
    "FRAME 2^62": _case(b"\x95" + struct.pack("<Q", 1 << 62) + b"}."),
    "billion laughs": _case(_laughs, "more than"),
    "a list 20,000 deep": _case(b"]" * 20_000 + b"a" * 19_999 + b".", "deep"),
    "a tuple 20,000 deep": _case(b")" + b"\x85" * 20_000 + b".", "deep"),
    "a deep tuple as a key": _case(b"})" + b"\x85" * 20_000 + b"Ns."),
    "a list that holds itself": _case(b"]q\x00h\x00a."),
    "a dictionary that holds itself": _case(b"}q\x00K\x01h\x00s."),
    "an object whose state is itself": _case(b"ccollections\nx\n)R" + b"q\x00h\x00b."),
    "a cycle through a tuple": _case(b"]q\x00h\x00\x85a."),
    "LONG4 of 64 KB": _case(b"\x8b" + struct.pack("<i", 65_536) + b"\x7f" * 65_536 + b"."),
    "LONG4 of negative length": _case(b"\x8b" + struct.pack("<i", -5) + b"."),
    "a decimal integer of 100,000 digits": _case(b"I" + b"9" * 100_000 + b"\n."),
    "a list as a key": _case(b"}]Ns."),
    "a dictionary as a key": _case(b"}}Ns."),
    "keys 1, True and 1.0": _case(b"}(K\x01K\x05\x88K\x06G" + struct.pack(">d", 1.0) + b"K\x07u."),
    "NaN as a key, twice": _case(b"}(" + (b"G" + struct.pack(">d", float("nan")) + b"K\x05") * 2 + b"u."),
    "keys 0 and '0'": _case(b"}(K\x00K\x05" + _text("0") + b"K\x06u."),
    "the same key twice": _case(b"}(" + _text("model") + b"K\x05" + _text("model") + b"K\x06u."),
    "an underflow": _case(b"R."),
    "APPENDS without a mark": _case(b"]e."),
    "SETITEMS with an odd number": _case(b"}(K\x01K\x02K\x03u."),
    "SETITEM on a number": _case(b"K\x01K\x02K\x03s."),
    "SETITEM on a list": _case(b"]K\x00K\x03s."),
    "a GET of nothing": _case(b"h\x09."),
    "EXT1": _case(b"\x82\x01."),
    "EXT4": _case(b"\x84\x01\x00\x00\x00."),
    "NEXT_BUFFER": _case(b"\x97."),
    "a textual PERSID": _case(b"Pstorage\n."),
    "INST": _case(f"(S'{_TOUCH}'\nios\nsystem\n.".encode(), "weights_only"),
    "OBJ": _case(b"(cos\nsystem\n" + _text(_TOUCH) + b"o.", "weights_only"),
    "NEWOBJ_EX": _case(b"csubprocess\nPopen\n" + _text(_TOUCH) + b"\x85}" + _text("shell") + b"\x88s\x92."),
    "NEWOBJ": _case(b"csubprocess\nPopen\n" + _text(_TOUCH) + b"\x85\x81.", "weights_only"),
    "os.system": _case(_call("os.system", _TOUCH), "os.system"),
    "posix.system inside a checkpoint": _case(_inside(_call("posix.system", _TOUCH)), "posix.system"),
    "eval": _case(_call("builtins.eval", _OPEN), "builtins.eval"),
    "exec": _case(_call("builtins.exec", _OPEN), "builtins.exec"),
    "__import__ by Python 2's name": _case(_call("__builtin__.__import__", "antigravity"), "__import__"),
    "runpy": _case(_call("runpy.run_path", CANARY), "runpy"),
    "torch.load of a file": _case(_call("torch.load", CANARY), "torch.load"),
    "torch.storage._load_from_bytes": _case(b"ctorch.storage\n_load_from_bytes\nC\x03abc\x85R."),
    "getattr by a dotted name": _case(
        b"\x8c\x02os" + b"\x8c\x0cpath.os.exec" + b"\x93" + _text("x") + b"\x85R.", "path.os.exec"
    ),
    "STACK_GLOBAL of numbers": _case(b"K\x01K\x02\x93."),
    "a name with escapes": _case(b"c\x1b[31mred\n\x07bell\n)R."),
    "a function as its own argument": _case(b"cos\nsystem\nq\x00h\x00\x85R."),
    "a partial that runs": _case(b"cfunctools\npartial\ncos\nsystem\n" + _text(_TOUCH) + b"\x86R)R."),
    "BUILD with code": _case(b"ctypes\nFunctionType\n)R}" + _text("__code__") + _text("x") + b"sb."),
    "no STOP": _case(b"}", "ends"),
    "nothing but a protocol": _case(b""),
    "nothing to return": _case(b"."),
    "an unknown operation": _case(b"}\xff.", "operation"),
    "protocol 200": _case(b"\x80\xc8}."),
    "a second pickle behind": _case(lambda: b"}.\x80\x02" + _call("os.system", _TOUCH), "follow"),
    "PUT and GET for ever": _case(lambda: b"]" + b"q\x00h\x00" * 1_400_000 + b"."),
    "DUP for ever": _case(lambda: b"(" + b"N" + b"2" * 2_900_000 + b"t."),
    "a long string in many places": _case(lambda: b"(" + _text("x" * 100_000) + b"q\x00" + b"h\x00" * 200_000 + b"l."),
    "a long string copied": _case(lambda: _text("x" * 100_000) + b"q\x00" + b"(h\x00\x85o0" * 100_000 + b"."),
    "marks upon marks": _case(b"(" * 1_000_000 + b"."),
    "an escape in a Python 2 string": _case(b"S'\\xg1'\n."),
    "a string without an end": _case(b"S'abc"),
    "a float that is none": _case(b"Fnonsense\n."),
    "frozensets in sets": _case(b"(" * 2000 + b"\x91" * 2000 + b"."),
    "a memo of its own size": _case(b"]" + b"\x94" * 1_000_000 + b"."),
}
