"""Parse a schedule of the command line, a call with plain values and nested calls; nothing is evaluated.

``text`` → `parse` → `Call`; ``classes`` looks up the names in it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from trackopt.errors import UsageError

_REFERENCE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_MAX_LENGTH = 2000  # characters; Python's parser fails on deeper nesting than fits here


@dataclass(frozen=True)
class Call:
    """A call of a class with plain values, references and nested calls.

    Attributes:
        name: The class name, without its module.
        arguments: Positional arguments.
        keywords: Keyword arguments.
    """

    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """The name of a function in a module, not yet imported.

    Attributes:
        module: The module's dotted name.
        name: The function's name.
    """

    module: str
    name: str


def parse(text: str) -> Call:
    """Parse the text of a call.

    Values are numbers, strings, ``True``, ``False``, ``None``, lists and tuples, further calls, and functions as
    ``package.module:function``.

    Raises:
        UsageError: The text is not such a call.

    Example:
        >>> parse("StepLR(50, gamma=0.5)")
        Call(name='StepLR', arguments=(50,), keywords={'gamma': 0.5})
        >>> parse("LambdaLR(my.schedules:warmup)").arguments
        (Reference(module='my.schedules', name='warmup'),)
    """
    try:
        # A colon is valid nowhere else; with a dot instead the text is Python.
        body = ast.parse(_REFERENCE.sub(r"\1.\2", text[:_MAX_LENGTH].strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f'{text}: not a call such as "StepLR(50, gamma=0.5)"; check brackets and quotes') from error
    if isinstance(body, ast.Name):
        body = ast.Call(body, [], [])
    if not isinstance(body, ast.Call):
        raise _unsupported(body)
    return _parse_call(body)


def _parse_call(node: ast.Call) -> Call:
    name = _dotted_name(node.func)
    if name is None:
        raise _unsupported(node)
    if any(isinstance(argument, ast.Starred) for argument in node.args):
        raise _unsupported(node)
    keywords = {keyword.arg: _parse_value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if len(keywords) < len(node.keywords):
        raise _unsupported(node)
    return Call(name.rpartition(".")[2], tuple(map(_parse_value, node.args)), keywords)


def _parse_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _parse_value(node.operand)
        if isinstance(number, int | float):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.List | ast.Tuple):
        return [_parse_value(part) for part in node.elts]
    if isinstance(node, ast.Call):
        return _parse_call(node)
    if (name := _dotted_name(node)) is not None:
        module, dot, function = name.rpartition(".")
        if not dot:
            raise UsageError(f'{name}: put text in quotes, as "{name}", and name a function as package.module:function')
        return Reference(module, function)
    raise _unsupported(node)


def _dotted_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := _dotted_name(node.value)) is not None:
        return f"{front}.{node.attr}"
    return None


def _unsupported(node: ast.expr) -> UsageError:
    return UsageError(
        f"{ast.unparse(node)}: more than a call with plain values; it is read, not evaluated, so write numbers out, "
        "and name a function as package.module:function"
    )
