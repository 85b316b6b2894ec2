"""Restore the types of a loaded checkpoint's values from its table, which `trackopt.checkpoint.encoding` wrote.

Nothing is imported and no constructor of the user's is called: a dataclass, named tuple or enumeration is restored only
if its class is in this process already.
"""

from __future__ import annotations

import datetime
import enum
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trackopt.checkpoint.class_names import find_class
from trackopt.checkpoint.resharding import LazyTensor
from trackopt.checkpoint.type_encoders import FACTORIES, format_path
from trackopt.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def decode(tree: dict[str, Any], types: Iterable[Sequence[Any]]) -> None:
    """Restore the types of a tree's values, in place.

    Args:
        tree: The tree, or some of its keys.
        types: Its table.

    Raises:
        MismatchError: A class is not in this process, or the table does not fit the tree.
    """
    root = _Node()
    try:
        for path, kind, detail in types:
            if path[0] in tree:
                root.add(path, kind, detail)
        root.restore(tree, ())
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise MismatchError(f"its table of types does not fit its contents ({error!r})") from error


def keep_live(saved: Any, live: Any) -> Any:
    """Return a saved value with the live objects that equal the numbers and texts that were saved of them.

    So a member of an enumeration stays one although the file has only its number.
    """
    if isinstance(saved, dict) and isinstance(live, dict):
        for key in saved.keys() & live.keys():
            saved[key] = keep_live(saved[key], live[key])
    elif type(saved) in (list, tuple) and isinstance(live, (list, tuple)) and len(saved) == len(live):
        return type(saved)(map(keep_live, saved, live))
    elif type(saved) in (int, float, complex, str, bytes) and type(live) not in (bool, type(saved)):
        return live if isinstance(live, type(saved)) and live == saved else saved
    return saved


@dataclass
class _Node:
    """A value of the tree whose type, or that of a value below it, is in the table."""

    kinds: list[tuple[str, Any]] = field(default_factory=list)
    children: dict[Any, _Node] = field(default_factory=dict)

    def add(self, path: Iterable[Any], kind: str, detail: Any) -> None:
        node = self
        for key in path:
            node = node.children.setdefault(key, _Node())
        node.kinds.append((kind, detail))

    def restore(self, value: Any, path: tuple[Any, ...]) -> Any:
        """Return the value with its type, and those of the values below it."""
        parts = list(value) if isinstance(value, tuple) else value
        for key, child in self.children.items():
            parts[key] = child.restore(parts[key], (*path, key))
        value = tuple(parts) if isinstance(value, tuple) else value
        for kind, detail in self.kinds:
            value = _restore(kind, value, detail, path)
        return value


def _restore(kind: str, value: Any, detail: Any, path: tuple[Any, ...]) -> Any:
    if kind in _CLASSES:
        name, argument = detail if kind in ("enum", "member") else (detail, value)
        cls = find_class(name)
        restored = _ABSENT if cls is None else _CLASSES[kind](cls, argument)
        if restored is not _ABSENT:
            return restored
        if kind == "member":  # the value is the number or the text that the member was
            return value
        raise MismatchError(
            f"{format_path(path)} was a {name.replace(':', '.')}, which is not what this process has under that name; "
            "import the module that defines it first"
        )
    if isinstance(value, list):
        value = [part.read() if isinstance(part, LazyTensor) else part for part in value]
    return _BUILDERS[kind](value, detail)


_ABSENT = object()


def _namedtuple(cls: Any, values: Any) -> Any:
    fits = issubclass(cls, tuple) and len(getattr(cls, "_fields", ())) == len(values)
    return tuple.__new__(cls, values) if fits else _ABSENT


def _dataclass(cls: Any, values: Any) -> Any:
    if not is_dataclass(cls) or {field.name for field in fields(cls)} != values.keys():
        return _ABSENT
    restored: Any = object.__new__(cls)  # type: ignore[arg-type]  # typeshed's guard leaves instances in
    for name, value in values.items():
        object.__setattr__(restored, name, value)
    return restored


def _enum(cls: Any, name: Any) -> Any:
    return cls.__members__.get(name, _ABSENT) if issubclass(cls, enum.Enum) else _ABSENT


def _array(value: Any, dtype: str) -> Any:
    return (value.read() if isinstance(value, LazyTensor) else value).numpy().astype(dtype, copy=False)


def _path(value: str, name: str) -> Any:
    return {each.__name__: each for each in (pathlib.Path, pathlib.PurePosixPath, pathlib.PureWindowsPath)}[name](value)


_CLASSES: dict[str, Callable[[Any, Any], Any]] = {
    "namedtuple": _namedtuple,
    "dataclass": _dataclass,
    "enum": _enum,
    "member": _enum,
}
_BUILDERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda value, _: dict(value),
    "OrderedDict": lambda value, _: OrderedDict(value),
    "Counter": lambda value, _: Counter(value),
    "defaultdict": lambda value, factory: defaultdict(FACTORIES[factory], value),
    "deque": deque,
    "set": lambda value, _: set(value),
    "frozenset": lambda value, _: frozenset(value),
    "bytes": lambda value, _: value.encode(),
    "ndarray": _array,
    "scalar": lambda value, dtype: np.dtype(dtype).type(value),
    "scalars": lambda value, dtype: type(value)(map(np.dtype(dtype).type, value)),
    "datetime": lambda value, fold: datetime.datetime.fromisoformat(value).replace(fold=fold),
    "date": lambda value, _: datetime.date.fromisoformat(value),
    "time": lambda value, fold: datetime.time.fromisoformat(value).replace(fold=fold),
    "timedelta": lambda value, _: datetime.timedelta(*value),
    "path": _path,
}
