"""What a scheduler was built with, as plain values: a script that changed can be told from the one that saved.

Right after it is built, a scheduler's attributes are its settings and its first position, so two that were built alike
are equal then. Functions (LambdaLR saves nothing of them) stand as a fingerprint of their code and of the numbers
that they use.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_PYTHON = f"python {sys.version_info.major}.{sys.version_info.minor}"  # bytecode differs from one to the next


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler that was just built, by dotted path.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> found = scheduler_config(torch.optim.lr_scheduler.StepLR(optimizer, 30))
        >>> found["step_size"], found["gamma"], found["base_lrs.0"]
        (30, 0.1, 0.1)
    """
    return dict(_flat("", vars(scheduler)))


def changed_keys(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """The paths at which two schedulers' settings differ; code of different Python versions is not compared."""
    return [path for path in {**saved, **live} if not _same(saved.get(path), live.get(path))]


def _same(saved: Any, live: Any) -> bool:
    if isinstance(saved, dict) and isinstance(live, dict) and saved["python"] != live["python"]:
        return True
    return bool(saved == live or (saved != saved and live != live))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), part)
    elif isinstance(value, LRScheduler):
        yield f"{path}.class", type(value).__name__
        yield from _flat(path, vars(value))
    elif not isinstance(value, Optimizer):
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _NUMBERS):
        return value
    if isinstance(value, (FunctionType, MethodType, functools.partial)):
        return {"python": _PYTHON, "code": _fingerprint(value)}
    return f"a {type(value).__name__}"


def _fingerprint(function: Any) -> str:
    return hashlib.sha256(repr(list(_traits(function))).encode()).hexdigest()[:16]


def _traits(function: Any) -> Iterator[Any]:
    """What decides what a function returns, as far as it can be seen."""
    if isinstance(function, functools.partial):
        yield from _traits(function.func)
        yield [_number(value) for value in (*function.args, *function.keywords.items())]
    elif isinstance(function, MethodType):
        yield from _traits(function.__func__)
    elif isinstance(function, FunctionType):
        yield from _code(function.__code__)
        yield [_number(value) for value in function.__defaults__ or ()]
        yield [_number(cell.cell_contents) for cell in function.__closure__ or ()]
        names = [name for name in function.__code__.co_names if name in function.__globals__]
        yield [(name, _number(function.__globals__[name])) for name in names]
    else:
        yield type(function).__name__


def _code(code: CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield _number(constant)


def _number(value: Any) -> Any:
    """A number, or containers of them; of anything else its class, which a new process names alike."""
    if isinstance(value, _NUMBERS):
        return value
    if isinstance(value, (list, tuple)):
        return [_number(part) for part in value]
    return f"a {type(value).__name__}"
