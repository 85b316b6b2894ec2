"""Which variables of a running function are carried on: read again before they are assigned.

A loss that the next iteration computes anew is not carried on; a sum that it adds to is.
"""

from __future__ import annotations

import dis
import re
import types
from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ACCESS = re.compile(r"(LOAD|STORE|DELETE)_(?:FAST|NAME|GLOBAL|DEREF|CLOSURE)")  # twice in a superinstruction
_ENDS = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"}
_JUMPS = {"JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"}  # without a condition


def carried_names(frame: types.FrameType) -> frozenset[str]:
    """Return the names of the variables that are read, after the current instruction, before they are assigned.

    In a ``for`` loop that asks for its next item, it is assumed that there is one. Variables that other functions share
    always count; what only an exception handler reads does not.
    """
    live, offsets = _live_before(frame.f_code)
    following = bisect_right(offsets, frame.f_lasti)  # which may be within the instruction, at its cache
    return (live[following] if following < len(live) else frozenset()) | _shared_names(frame.f_code)


@lru_cache(maxsize=256)
def _live_before(code: types.CodeType) -> tuple[list[frozenset[str]], list[int]]:
    """Return the live variables before each instruction, and the instructions' offsets."""
    instructions = list(dis.get_instructions(code))
    positions = {instruction.offset: position for position, instruction in enumerate(instructions)}
    successors = [_successors(each, position, positions) for position, each in enumerate(instructions)]
    live: list[frozenset[str]] = [frozenset()] * len(instructions)
    changed = True
    while changed:
        changed = False
        for position in reversed(range(len(instructions))):
            names = {name for following in successors[position] if following < len(live) for name in live[following]}
            for access, name in reversed(list(_accesses(instructions[position]))):
                (names.add if access == "LOAD" else names.discard)(name)
            if names != live[position]:
                live[position], changed = frozenset(names), True
    return live, list(positions)


def _successors(instruction: dis.Instruction, position: int, positions: dict[int, int]) -> list[int]:
    following = [] if instruction.opname in _ENDS | _JUMPS else [position + 1]
    if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
        following += [positions[instruction.argval]] if instruction.argval in positions else []
    return following


def _accesses(instruction: dis.Instruction) -> Iterator[tuple[str, str]]:
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    yield from zip(_ACCESS.findall(instruction.opname), names, strict=False)


@lru_cache(maxsize=256)
def _shared_names(code: types.CodeType) -> frozenset[str]:
    """Return the variables that functions defined here may read as well."""
    names = {*code.co_cellvars, *code.co_freevars}
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    while inner:
        each = inner.pop()
        inner += [const for const in each.co_consts if isinstance(const, types.CodeType)]
        names |= {step.argval for step in dis.get_instructions(each) if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}}
    return frozenset(names)
