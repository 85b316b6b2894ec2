"""Turn a parsed call into a factory of schedulers; names and arguments are checked against torch's own classes."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from trackopt.errors import UsageError
from trackopt.schedule.expression import Call, Reference
from trackopt.utils.suggest import suggest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

_OPTIMIZER = "optimizer"
_LAST_EPOCH = "last_epoch"

#: Exceptions of torch, or of a user's function, for arguments that make no sense.
CONSTRUCTOR_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)


def find_classes() -> dict[str, type[Any]]:
    """Return every scheduler class of torch by name.

    Example:
        >>> {"StepLR", "ReduceLROnPlateau", "SequentialLR", "SWALR"} <= set(find_classes())
        True
    """
    base = lr_scheduler.LRScheduler
    schedulers = {
        name: kind
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base and not name.startswith("_")
    }
    return schedulers | {SWALR.__name__: SWALR}


def make_factory(call: Call) -> Callable[[Optimizer], Any]:
    """Return a function that builds the scheduler of a call on the optimizer that it receives.

    Raises:
        UsageError: A class, an argument or a function is unknown, or an argument is missing. The returned function
            raises it for what torch refuses.

    Example:
        >>> import torch
        >>> from trackopt.schedule.expression import parse
        >>> build = make_factory(parse("StepLR(50, gamma=0.5)"))
        >>> build(torch.optim.SGD([torch.zeros(1)], lr=0.1)).gamma
        0.5
    """
    scheduler_class = _find_class(call)
    prepared = {name: _prepare(value) for name, value in _bind_arguments(call).items()}

    def build(optimizer: Optimizer) -> Any:
        arguments = {name: _build(value, optimizer) for name, value in prepared.items()}
        try:
            return scheduler_class(optimizer=optimizer, **arguments)
        except CONSTRUCTOR_ERRORS as error:
            raise constructor_error(call.name, error) from error

    return build


def constructor_error(name: str, error: Exception) -> UsageError:
    """Return the error of torch, or of the user's function, as one line."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error  # str(KeyError) is a repr
    reason = " ".join(str(message).split()) or type(error).__name__
    return UsageError(f"{name}: {reason if isinstance(error, ValueError) else f'{type(error).__name__}: {reason}'}")


def get_last_epoch(call: Call) -> int:
    """Return the ``last_epoch`` of a call; -1 starts from the beginning.

    Raises:
        UsageError: It is no integer >= -1, or a nested schedule has its own.
    """
    arguments = _bind_arguments(call)
    value = arguments.get(_LAST_EPOCH, -1)
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise UsageError(f"{call.name}: last_epoch must be an integer >= -1, not {value!r}")
    parts = [
        part for argument in arguments.values() for part in (argument if isinstance(argument, list) else [argument])
    ]
    for part in parts:
        if isinstance(part, Call) and get_last_epoch(part) >= 0:
            raise UsageError(f"{part.name}: cannot have a last_epoch within {call.name}; give it to {call.name} alone")
    return value


def without_last_epoch(call: Call) -> Call:
    """Return the call without its ``last_epoch``."""
    return Call(call.name, (), {name: value for name, value in _bind_arguments(call).items() if name != _LAST_EPOCH})


def _find_class(call: Call) -> type[Any]:
    known = find_classes()
    if call.name not in known:
        raise UsageError(f"{call.name}: not a scheduler class of torch; {suggest(call.name, known)}")
    return known[call.name]


def _bind_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments of a call by parameter name."""
    parameters_taken = inspect.signature(_find_class(call)).parameters
    names = [name for name in parameters_taken if name != _OPTIMIZER]
    if len(call.arguments) > len(names):
        raise UsageError(f"{call.name}: takes {', '.join(names)}; {len(call.arguments)} values are too many")
    arguments = dict(zip(names, call.arguments, strict=False))
    for name, value in call.keywords.items():
        if name == _OPTIMIZER:
            raise UsageError(f"{call.name}: omit the optimizer, it is supplied")
        if name not in names:
            raise UsageError(f"{call.name}: unknown argument {name}; {suggest(name, names)}")
        if name in arguments:
            raise UsageError(f"{call.name}: {name} is given twice")
        arguments[name] = value
    parameters = inspect.signature(find_classes()[call.name]).parameters
    missing = [name for name in names if parameters[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise UsageError(f"{call.name}: needs {' and '.join(missing)}")
    return arguments


class _Nested:
    """A nested scheduler that is not built yet."""

    def __init__(self, call: Call) -> None:
        self.build = make_factory(call)


def _prepare(value: Any) -> Any:
    if isinstance(value, Call):
        return _Nested(value)
    if isinstance(value, Reference):
        return _import_function(value)
    return [_prepare(part) for part in value] if isinstance(value, list) else value


def _build(value: Any, optimizer: Optimizer) -> Any:
    if isinstance(value, _Nested):
        return value.build(optimizer)
    return [_build(part, optimizer) for part in value] if isinstance(value, list) else value


def _import_function(reference: Reference) -> Any:
    """Import the function that the user named; its module may be in the working directory, as for ``python -m``."""
    location = f"{reference.module}:{reference.name}"
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(reference.module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything, a script may exit
        reason = " ".join(str(error).split())
        raise UsageError(f"{location}: cannot be imported ({type(error).__name__}: {reason})") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, reference.name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"{location}: no such function; {suggest(reference.name, functions)}")
    return function
