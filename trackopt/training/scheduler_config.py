"""The configuration of a scheduler as plain values, to detect that a script changed it after a checkpoint.

Right after construction, a scheduler's attributes are its configuration and its first position, so two schedulers of
equal configuration are equal then. Functions, which LambdaLR does not save, are represented by a fingerprint of their
code and of the numbers that they use.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PLAIN_CLASSES = (bool, int, float, complex, str, bytes, type(None))
_PYTHON = f"python {sys.version_info.major}.{sys.version_info.minor}"  # bytecode differs between versions


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler that was just constructed, by dotted path.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> config = scheduler_config(torch.optim.lr_scheduler.StepLR(optimizer, 30))
        >>> config["step_size"], config["gamma"], config["base_lrs.0"]
        (30, 0.1, 0.1)
    """
    return dict(_flatten("", getattr(scheduler, "__dict__", {}), (scheduler,)))


def changed_keys(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return the paths at which two configurations differ; code of different Python versions is not compared."""
    paths = (path for path in {**saved, **live} if not _is_equal(saved.get(path), live.get(path)))
    return [path for path in paths if (path in saved and path in live) or not is_version_specific(path)]


def follows_lr(path: str, saved: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Return whether a difference is that of the optimizer's LR, or of a bound that the script derives from it."""
    parts = path.split(".")
    if path not in saved or path not in live:
        return False
    if len(parts) > 1 and parts[-2] in {"base_lrs", "_last_lr"}:
        return True
    if parts[-1] != "eta_min" and (len(parts) < 2 or parts[-2] not in {"min_lrs", "max_lrs"}):
        return False
    prefix = ".".join(parts[: -1 if parts[-1] == "eta_min" else -2])
    base = f"{prefix}.base_lrs.0" if prefix else "base_lrs.0"
    if not saved.get(base) or base not in live:
        return False
    return math.isclose(live[path] * saved[base], saved[path] * live[base], rel_tol=1e-6)


def is_version_specific(path: str) -> bool:
    """Return whether only some versions of torch have an attribute; it is none of a scheduler's arguments."""
    name = path.rpartition(".")[2]
    return name.startswith("_") or name == "verbose"


def _is_equal(saved: Any, live: Any) -> bool:
    if isinstance(saved, dict) and isinstance(live, dict) and saved["python"] != live["python"]:
        return True
    return bool(saved == live or (saved != saved and live != live))


def _flatten(path: str, value: Any, parents: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten(f"{path}.{key}" if path else str(key), part, parents)
    elif isinstance(value, LRScheduler):
        if not any(value is parent for parent in parents):
            yield f"{path}.class", type(value).__name__
            yield from _flatten(path, vars(value), (*parents, value))
    elif not isinstance(value, Optimizer):
        yield path, _to_plain(value)


def _to_plain(value: Any) -> Any:
    if isinstance(value, _PLAIN_CLASSES):
        return value
    if isinstance(value, (FunctionType, MethodType, functools.partial)):
        return {"python": _PYTHON, "code": _fingerprint(value)}
    return f"a {type(value).__name__}"


def _fingerprint(function: Any) -> str:
    return hashlib.sha256(repr(list(_traits(function))).encode()).hexdigest()[:16]


def _traits(function: Any) -> Iterator[Any]:
    """Yield the visible parts of a function that determine its result."""
    if isinstance(function, functools.partial):
        yield from _traits(function.func)
        yield [_to_number(value) for value in (*function.args, *function.keywords.items())]
    elif isinstance(function, MethodType):
        yield from _traits(function.__func__)
    elif isinstance(function, FunctionType):
        yield from _code(function.__code__)
        yield [_to_number(value) for value in function.__defaults__ or ()]
        yield [_to_number(cell.cell_contents) for cell in function.__closure__ or ()]
        names = [name for name in function.__code__.co_names if name in function.__globals__]
        yield [(name, _to_number(function.__globals__[name])) for name in names]
    else:
        yield type(function).__name__


def _code(code: CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield _to_number(constant)


def _to_number(value: Any) -> Any:
    """Return numbers and containers of them; for any other value its class, which is the same in a new process."""
    if isinstance(value, _PLAIN_CLASSES):
        return value
    if isinstance(value, (list, tuple)):
        return [_to_number(part) for part in value]
    return f"a {type(value).__name__}"
