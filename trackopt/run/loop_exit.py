"""How the user's code uses and leaves an iterator: by a loop or by ``next``, by ``break`` or by an exception.

A generator is closed in the same way in all these cases. The bytecode of the consumer tells them apart: ``break`` and
``return`` take the iterator off the stack by an instruction of their own; an exception leaves the frame at another one.
"""

from __future__ import annotations

import inspect
import opcode
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_POPS = {"POP_TOP", "POP_ITER"}  # the latter from Python 3.14 on
_SUSPENDED = {"YIELD_VALUE", "RESUME", "YIELD_FROM", "SEND"}  # a generator around ours, which is being closed too
_CALLS = {"CALL", "CALL_FUNCTION", "CALL_METHOD", "PRECALL"}


def is_left_on_purpose(consumer: FrameType | None) -> bool:
    """Return whether a ``for`` loop was left by ``break`` or ``return``; call it where ``GeneratorExit`` is caught.

    Args:
        consumer: The frame that held the generator: ``sys._getframe(1)`` in the generator itself.

    Returns:
        False after an exception, and where the generator was held by a variable that is gone.
    """
    while consumer is not None and is_generator(consumer) and _instruction(consumer) in _SUSPENDED:
        consumer = consumer.f_back
    return _instruction(consumer) in _POPS


def is_asked_by_next(consumer: FrameType | None) -> bool:
    """Return whether an item was asked for by a call of ``next``, not by a ``for`` loop or ``yield from``."""
    return _instruction(consumer) in _CALLS


def error_in_flight(known: BaseException | None = None) -> BaseException | None:
    """Return the exception that is being handled, or passes a ``finally``, here; ``None`` if it is ``known``."""
    error = sys.exc_info()[1]
    return None if error is known else error


def is_generator(frame: FrameType) -> bool:
    """Return whether a frame is that of a generator."""
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def _instruction(frame: FrameType | None) -> str:
    if frame is None or frame.f_lasti < 0:
        return ""
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]]
