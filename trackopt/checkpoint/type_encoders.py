"""How a value of each type is encoded: the table of `trackopt.checkpoint.encoding`."""

from __future__ import annotations

import datetime
import enum
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from trackopt.checkpoint.class_names import find_class, qualified_name
from trackopt.checkpoint.plain_values import ATOMS, BASES, plain_keys, to_base
from trackopt.errors import UsageError
from trackopt.training.objects import class_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Encoder = Callable[["StateEncoder", Any, tuple[Any, ...]], Any]

#: The default factories of a ``defaultdict`` that can be restored.
FACTORIES = {"None": None, "dict": dict, "list": list, "set": set, "int": int, "float": float}


class StateEncoder(Protocol):
    """The encoder of a state, as `trackopt.checkpoint.encoding` implements it."""

    subclasses: list[torch.Tensor]

    def encode(self, value: Any, *path: Any) -> Any:
        """Encode a value."""

    def note(self, path: tuple[Any, ...], kind: str, detail: Any = None) -> None:
        """Add an entry to the table of types."""

    def mapping(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        """Encode the items of a dict."""

    def items(self, value: Iterable[Any], path: tuple[Any, ...]) -> list[Any]:
        """Encode the items of a sequence."""


def format_path(path: Iterable[Any]) -> str:
    """Return a path as text.

    Example:
        >>> format_path(("optimizer", "state", 0, "queue"))
        'optimizer.state[0].queue'
    """
    return "".join(f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path).removeprefix(".")


def find_encoder(value: Any) -> Encoder:
    """Return the encoder of a value."""
    return _ENCODERS.get(type(value)) or _find_by_base(value)


def _mapping(encoder: StateEncoder, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
    return encoder.mapping(value, path)


def _native_mapping(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    """Encode an ``OrderedDict`` or a ``Counter``, which torch loads as themselves."""
    plain = encoder.mapping(value, path)
    if isinstance(plain, list):
        encoder.note(path, type(value).__name__)
        return plain
    items = type(value)(plain)
    if hasattr(value, "_metadata"):
        items._metadata = value._metadata  # the versions of a module's layers, which load_state_dict wants back
    return items


def _defaultdict(encoder: StateEncoder, value: defaultdict[Any, Any], path: tuple[Any, ...]) -> Any:
    name = getattr(value.default_factory, "__name__", "None")
    if FACTORIES.get(name, name) is not value.default_factory:
        raise _unsupported(value, path, "with a default_factory of its own")
    plain = encoder.mapping(value, path)
    encoder.note(path, "defaultdict", name)
    return plain


def _list(encoder: StateEncoder, value: list[Any], path: tuple[Any, ...]) -> Any:
    return encoder.items(value, path)


def _tuple(encoder: StateEncoder, value: tuple[Any, ...], path: tuple[Any, ...]) -> Any:
    return tuple(encoder.items(value, path))


def _deque(encoder: StateEncoder, value: deque[Any], path: tuple[Any, ...]) -> Any:
    plain = encoder.items(value, path)
    encoder.note(path, "deque", value.maxlen)
    return plain


def _set(encoder: StateEncoder, value: set[Any], path: tuple[Any, ...]) -> Any:
    keys = plain_keys(value)
    if keys is not None and all(type(key) in ATOMS or type(key) is tuple for key in value):
        return set(keys)
    plain = encoder.items(value, path)
    encoder.note(path, "set")
    return plain


def _frozenset(encoder: StateEncoder, value: frozenset[Any], path: tuple[Any, ...]) -> Any:
    plain = encoder.items(value, path)
    encoder.note(path, "frozenset")
    return plain


def _bytes(encoder: StateEncoder, value: bytes, path: tuple[Any, ...]) -> Any:
    if value:
        return value
    encoder.note(path, "bytes")  # torch refuses the pickle of empty bytes
    return ""


def _array(encoder: StateEncoder, value: np.ndarray[Any, Any], path: tuple[Any, ...]) -> Any:
    native = value.astype(value.dtype.newbyteorder("="), copy=False)
    if not native.flags.writeable or any(step < 0 for step in native.strides):
        native = native.copy()
    try:
        tensor = torch.from_numpy(native)
    except TypeError as error:
        raise _unsupported(value, path, f"of {value.dtype}") from error
    encoder.note(path, "ndarray", value.dtype.str)
    return tensor


def _scalar(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    """Encode a NumPy scalar."""
    plain = value.item()
    if type(plain) not in (bool, int, float, complex, str) or value.dtype.kind in "mM":
        raise _unsupported(value, path)
    encoder.note(path, "scalar", value.dtype.str)
    return plain


def _time(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    """Encode a date or a time as ISO text."""
    zone = getattr(value, "tzinfo", None)
    if zone is not None and type(zone) is not datetime.timezone:
        raise _unsupported(value, path, f"with the time zone {zone}")
    encoder.note(path, type(value).__name__, getattr(value, "fold", 0))
    return value.isoformat()


def _duration(encoder: StateEncoder, value: datetime.timedelta, path: tuple[Any, ...]) -> Any:
    encoder.note(path, "timedelta")
    return [value.days, value.seconds, value.microseconds]


def _path(encoder: StateEncoder, value: pathlib.PurePath, path: tuple[Any, ...]) -> Any:
    encoder.note(path, "path", "Path" if isinstance(value, pathlib.Path) else type(value).__name__)
    return str(value)


def _namedtuple(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    _require_importable(value, path)
    plain = tuple(encoder.items(value, path))
    encoder.note(path, "namedtuple", qualified_name(type(value)))
    return plain


def _dataclass(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    _require_importable(value, path)
    names = [field.name for field in fields(value)]
    if getattr(value, "__dict__", {}).keys() - set(names) or not all(hasattr(value, name) for name in names):
        raise _unsupported(value, path, "whose attributes are not its fields")
    plain = {name: encoder.encode(getattr(value, name), *path, name) for name in names}
    encoder.note(path, "dataclass", qualified_name(type(value)))
    return plain


def _enum(encoder: StateEncoder, value: enum.Enum, path: tuple[Any, ...]) -> Any:
    """Encode a member as the number or text that it is, else as its name."""
    cls = type(value)
    is_restorable = find_class(qualified_name(cls)) is cls and cls.__members__.get(value.name) is value
    is_base = isinstance(value, BASES)
    if is_restorable:
        encoder.note(path, "member" if is_base else "enum", (qualified_name(cls), value.name))
    elif not is_base:
        raise _unsupported(value, path, "whose class is defined inside a function")
    return to_base(value) if is_base else value.name


def _subclass(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    return encoder.encode(to_base(value), *path)


def _tensor_subclass(encoder: StateEncoder, value: torch.Tensor, _: tuple[Any, ...]) -> Any:
    encoder.subclasses.append(value)  # the names in its pickle decide whether torch loads it
    return value


def _refuse(_: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    raise _unsupported(value, path)


def _find_by_base(value: Any) -> Encoder:
    """Return the encoder of a value whose exact type is not in the table."""
    if isinstance(value, enum.Enum):
        return _enum
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _namedtuple
    if is_dataclass(value) and not isinstance(value, (type, torch.Tensor, *BASES, dict, list, tuple, set)):
        return _dataclass
    for base, encoder in _SUBCLASSES:
        if isinstance(value, base):
            return encoder
    return _refuse


def _require_importable(value: Any, path: tuple[Any, ...]) -> None:
    if find_class(qualified_name(type(value))) is not type(value):
        raise _unsupported(value, path, "whose class is defined inside a function")


def _unsupported(value: Any, path: tuple[Any, ...], detail: str = "") -> UsageError:
    described = f"{class_name(value)} {detail}".rstrip()
    return UsageError(
        f"{format_path(path)} is a {described}, which a checkpoint cannot hold safely; "
        "let its state_dict() return numbers, strings, tensors, lists and dicts"
    )


_ENCODERS: dict[type, Encoder] = {
    dict: _mapping,
    OrderedDict: _native_mapping,
    Counter: _native_mapping,
    defaultdict: _defaultdict,
    list: _list,
    tuple: _tuple,
    deque: _deque,
    set: _set,
    frozenset: _frozenset,
    bytes: _bytes,
    np.ndarray: _array,
    datetime.datetime: _time,
    datetime.date: _time,
    datetime.time: _time,
    datetime.timedelta: _duration,
}
_SUBCLASSES: tuple[tuple[Any, Encoder], ...] = (
    (np.generic, _scalar),
    (torch.Tensor, _tensor_subclass),
    (pathlib.PurePath, _path),
    (BASES, _subclass),
)
