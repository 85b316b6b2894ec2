"""Turn a state into values that ``torch.load(weights_only=True)`` loads, and a table of the types that it had.

The values stay natural: a deque becomes a list, a dataclass a dict, a path text, an array a tensor. The table is the
entry ``types`` of a run's checkpoint; `trackopt.checkpoint.decoding` restores the types from it.
"""

from __future__ import annotations

import functools
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from trackopt.archive.unpickler.limits import MAX_DEPTH
from trackopt.checkpoint.plain_values import ATOMS, plain_keys
from trackopt.checkpoint.type_encoders import find_encoder, format_path
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

#: The path of a value in the tree, the kind of its type, and what else its restoration needs.
TypeEntry = tuple[tuple[Any, ...], str, Any]

_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)


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
        if type(value) in ATOMS:
            return value
        if len(path) > MAX_DEPTH:
            raise UsageError(f"{format_path(path[:3])} is nested more than {MAX_DEPTH} levels deep; flatten it")
        return find_encoder(value)(self, value, path)

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
            key: child if type(child) in ATOMS else self.encode(child, *path, key)
            for key, child in zip(keys, value.values(), strict=True)
            if not (omits and isinstance(child, _FUNCTIONS))
        }

    def items(self, value: Iterable[Any], path: tuple[Any, ...]) -> list[Any]:
        """Return a list."""
        items = list(value)
        kinds = set(map(type, items))
        if kinds <= ATOMS:
            return items
        if len(kinds) == 1 and issubclass(kinds.pop(), (np.bool_, np.number)):
            numbers = [child.item() for child in items]
            if type(numbers[0]) in ATOMS:  # one entry of the table for all of them
                self.note(path, "scalars", items[0].dtype.str)
                return numbers
        return [self.encode(child, *path, i) for i, child in enumerate(items)]
