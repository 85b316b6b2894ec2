"""From a parsed call to a factory of schedulers: names and arguments are checked against torch's own classes."""

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

#: What torch, or a user's function, raises where an argument makes no sense.
CONSTRUCTOR_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)


def classes() -> dict[str, type[Any]]:
    """Every scheduler class of torch, by name.

    Example:
        >>> {"StepLR", "ReduceLROnPlateau", "SequentialLR", "SWALR"} <= set(classes())
        True
    """
    base = lr_scheduler.LRScheduler
    found = {
        name: kind
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base and not name.startswith("_")
    }
    return found | {SWALR.__name__: SWALR}


def factory(call: Call) -> Callable[[Optimizer], Any]:
    """What builds the scheduler that a call describes, on whatever optimizer it is given.

    Raises:
        UsageError: A class, an argument or a function is unknown, or one is missing. What torch refuses is told when
            the scheduler is built.

    Example:
        >>> import torch
        >>> from trackopt.schedule.expression import parse
        >>> build = factory(parse("StepLR(50, gamma=0.5)"))
        >>> build(torch.optim.SGD([torch.zeros(1)], lr=0.1)).gamma
        0.5
    """
    kind = _class(call)
    given = {name: _prepared(value) for name, value in _by_name(call).items()}

    def build(optimizer: Optimizer) -> Any:
        arguments = {name: _built(value, optimizer) for name, value in given.items()}
        try:
            return kind(optimizer=optimizer, **arguments)
        except CONSTRUCTOR_ERRORS as error:
            raise constructor_error(call.name, error) from error

    return build


def constructor_error(name: str, error: Exception) -> UsageError:
    """What torch, or a function that was named, says against a schedule, in one line."""
    told = error.args[0] if isinstance(error, KeyError) and error.args else error  # whose text is a repr
    reason = " ".join(str(told).split()) or type(error).__name__
    return UsageError(f"{name}: {reason if isinstance(error, ValueError) else f'{type(error).__name__}: {reason}'}")


def last_epoch(call: Call) -> int:
    """What a call gives as ``last_epoch``; -1 is from the start.

    Raises:
        UsageError: It is no whole number from -1 on, or a schedule within this one has one of its own.
    """
    given = _by_name(call)
    value = given.get(_LAST_EPOCH, -1)
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise UsageError(f"{call.name}: last_epoch must be a whole number from -1 on, not {value!r}")
    inner = [part for each in given.values() for part in (each if isinstance(each, list) else [each])]
    for part in inner:
        if isinstance(part, Call) and last_epoch(part) >= 0:
            raise UsageError(f"{part.name}: cannot have a last_epoch within {call.name}; give it to {call.name} alone")
    return value


def without_last_epoch(call: Call) -> Call:
    """The same call without ``last_epoch``."""
    return Call(call.name, (), {name: value for name, value in _by_name(call).items() if name != _LAST_EPOCH})


def _class(call: Call) -> type[Any]:
    known = classes()
    if call.name not in known:
        raise UsageError(f"{call.name}: no scheduler class of torch; {suggest(call.name, known)}")
    return known[call.name]


def _by_name(call: Call) -> dict[str, Any]:
    """The arguments of a call by the names that its class gives them."""
    taken = inspect.signature(_class(call)).parameters
    open_to_all = [name for name in taken if name != _OPTIMIZER]
    if len(call.arguments) > len(open_to_all):
        raise UsageError(f"{call.name}: takes {', '.join(open_to_all)}; {len(call.arguments)} values are too many")
    given = dict(zip(open_to_all, call.arguments, strict=False))
    for name, value in call.keywords.items():
        if name == _OPTIMIZER:
            raise UsageError(f"{call.name}: leave out the optimizer, it is supplied")
        if name not in open_to_all:
            raise UsageError(f"{call.name}: has no argument {name}; {suggest(name, open_to_all)}")
        if name in given:
            raise UsageError(f"{call.name}: {name} is given twice")
        given[name] = value
    parameters = inspect.signature(classes()[call.name]).parameters
    missing = [
        name for name in open_to_all if parameters[name].default is inspect.Parameter.empty and name not in given
    ]
    if missing:
        raise UsageError(f"{call.name}: needs {' and '.join(missing)}")
    return given


class _Nested:
    """A scheduler within another one, still to be built."""

    def __init__(self, call: Call) -> None:
        self.build = factory(call)


def _prepared(value: Any) -> Any:
    if isinstance(value, Call):
        return _Nested(value)
    if isinstance(value, Reference):
        return _imported(value)
    return [_prepared(part) for part in value] if isinstance(value, list) else value


def _built(value: Any, optimizer: Optimizer) -> Any:
    if isinstance(value, _Nested):
        return value.build(optimizer)
    return [_built(part, optimizer) for part in value] if isinstance(value, list) else value


def _imported(reference: Reference) -> Any:
    """The function that the user named; its module may lie in the working directory, as for ``python -m``."""
    where = f"{reference.module}:{reference.name}"
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(reference.module)
    except (Exception, SystemExit) as error:  # whatever a user's module may raise; a script may want arguments
        reason = " ".join(str(error).split())
        raise UsageError(f"{where}: cannot be imported ({type(error).__name__}: {reason})") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, reference.name, None)
    if not callable(found):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"{where}: no such function; {suggest(reference.name, functions)}")
    return found
