"""Turn a state into values that ``torch.load(weights_only=True)`` loads, and a table of the types that it had.

The values stay natural: a deque becomes a list, a dataclass a dict, a path text, an array a tensor. The table is the
entry ``types`` of a run's checkpoint; `trackopt.checkpoint.decoding` restores the types from it.
"""

from __future__ import annotations

import datetime
import enum
import functools
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trackopt.archive.unpickler.limits import MAX_DEPTH
from trackopt.checkpoint.class_names import find_class, qualified_name
from trackopt.errors import UsageError
from trackopt.training.objects import class_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: The path of a value in the tree, the kind of its type, and what else its restoration needs.
TypeEntry = tuple[tuple[Any, ...], str, Any]

#: The default factories of a ``defaultdict`` that can be restored.
FACTORIES = {"None": None, "dict": dict, "list": list, "set": set, "int": int, "float": float}

_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
_BASES = (int, float, complex, str, bytes)
_ATOMS = frozenset((
    type(None), bool, int, float, complex, str,
    torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device, torch.Size,
))  # fmt: skip


class StateEncoder:
    """Encodes the states of one checkpoint.

    Attributes:
        types: The types that the encoded values do not show, those of inner values first.
        subclasses: The tensors whose class is not torch's own.
    """

    def __init__(self) -> None:
        self.subclasses: list[torch.Tensor] = []
        self.types: list[TypeEntry] = []

    def encode(self, value: Any, *path: Any) -> Any:
        """Return a value of plain types and tensors.

        Args:
            value: The state.
            *path: Its keys from the top of the checkpoint.

        Raises:
            UsageError: The state holds something that cannot be loaded safely.
        """
        kind = type(value)
        if kind in _ATOMS:
            return value
        if len(path) > MAX_DEPTH:
            raise UsageError(f"{format_path(path[:3])} is nested more than {MAX_DEPTH} levels deep; flatten it")
        encode = _ENCODERS.get(kind) or _find_encoder(value)
        return encode(self, value, path)

    def note(self, path: tuple[Any, ...], kind: str, detail: Any = None) -> None:
        """Add an entry to the table."""
        self.types.append((path, kind, detail))

    def mapping(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        """Return a dict of the same kind; a list of pairs if a key has no plain type."""
        keys = plain_keys(value)
        if keys is None:
            pairs = [self.encode(pair, *path, i) for i, pair in enumerate(value.items())]
            self.note(path, "dict")
            return pairs
        omits = path[0] == "scheduler"  # the functions of a scheduler are its configuration: the live ones stay
        return {
            key: child if type(child) in _ATOMS else self.encode(child, *path, key)
            for key, child in zip(keys, value.values(), strict=True)
            if not (omits and isinstance(child, _FUNCTIONS))
        }

    def items(self, value: Iterable[Any], path: tuple[Any, ...]) -> list[Any]:
        """Return a list."""
        items = list(value)
        if set(map(type, items)) <= _ATOMS:
            return items
        return [self.encode(child, *path, i) for i, child in enumerate(items)]


def plain_keys(keys: Iterable[Any]) -> list[Any] | None:
    """Return keys of plain types that are equal to the given ones; ``None`` if there are none."""
    keys = list(keys)
    if set(map(type, keys)) <= _ATOMS:
        return keys
    plain = [_plain_key(key) for key in keys]
    return None if any(key is _NO_KEY for key in plain) or len(set(plain)) < len(plain) else plain


def format_path(path: Iterable[Any]) -> str:
    """Return a path as text.

    Example:
        >>> format_path(("optimizer", "state", 0, "queue"))
        'optimizer.state[0].queue'
    """
    return "".join(f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path).removeprefix(".")


_NO_KEY = object()


def _plain_key(key: Any) -> Any:
    if type(key) in _ATOMS:
        return key
    if type(key) is tuple:
        parts = [_plain_key(part) for part in key]
        return _NO_KEY if any(part is _NO_KEY for part in parts) else tuple(parts)
    if isinstance(key, np.generic):
        key = key.item()
    plain = _to_base(key) if isinstance(key, _BASES) else _NO_KEY
    is_empty = type(plain) is bytes and not plain
    return plain if plain == key and hash(plain) == hash(key) and not is_empty else _NO_KEY


def _to_base(value: Any) -> Any:
    """Return a number or text as the built-in type that its class extends, without calling the class's own methods."""
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return complex.__pos__(value)
    return str.__str__(value) if isinstance(value, str) else bytes.__getitem__(value, slice(None))


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
    if keys is not None and all(type(key) in _ATOMS or type(key) is tuple for key in value):
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
    is_base = isinstance(value, _BASES)
    if is_restorable:
        encoder.note(path, "member" if is_base else "enum", (qualified_name(cls), value.name))
    elif not is_base:
        raise _unsupported(value, path, "whose class is defined inside a function")
    return _to_base(value) if is_base else value.name


def _subclass(encoder: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    return encoder.encode(_to_base(value), *path)


def _tensor_subclass(encoder: StateEncoder, value: torch.Tensor, _: tuple[Any, ...]) -> Any:
    encoder.subclasses.append(value)  # the names in its pickle decide whether torch loads it
    return value


def _refuse(_: StateEncoder, value: Any, path: tuple[Any, ...]) -> Any:
    raise _unsupported(value, path)


def _find_encoder(value: Any) -> Callable[[StateEncoder, Any, tuple[Any, ...]], Any]:
    """Return the encoder of a value whose exact type is not in the table."""
    if isinstance(value, enum.Enum):
        return _enum
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _namedtuple
    if is_dataclass(value) and not isinstance(value, (type, torch.Tensor, *_BASES, dict, list, tuple, set)):
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


_ENCODERS: dict[type, Callable[[StateEncoder, Any, tuple[Any, ...]], Any]] = {
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
_SUBCLASSES: tuple[tuple[Any, Callable[[StateEncoder, Any, tuple[Any, ...]], Any]], ...] = (
    (np.generic, _scalar),
    (torch.Tensor, _tensor_subclass),
    (pathlib.PurePath, _path),
    (_BASES, _subclass),
)
