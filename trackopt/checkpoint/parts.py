"""The parts of a checkpoint's tree that rarely change between two saves, so that they are pickled once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trackopt.utils.types import CheckpointTree

_KEYS = {str, int}
_DICTS = (dict, OrderedDict)


class OpenDict(dict[Any, Any]):
    """A dict whose values may be parts, or such dicts; a checkpoint holds it as a plain one."""


@dataclass(frozen=True)
class ConstantPart:
    """Plain values that are compared as a whole.

    Attributes:
        value: The values.
    """

    value: Any
    tensors: tuple[Tensor, ...] = ()

    @property
    def layout(self) -> Any:
        """What has to be equal for the part to be the same, besides its tensors."""
        return self.value


@dataclass(frozen=True)
class TensorPart:
    """A state of tensors only: a dict of them, or of dicts of them.

    Attributes:
        value: The state.
        layout: Its keys, in order, and the versions of a module's layers.
        tensors: Its tensors, in order.
    """

    value: dict[Any, Any]
    layout: Any
    tensors: list[Tensor]

    @classmethod
    def of(cls, state: Any) -> TensorPart | None:
        """Return a state as a part; ``None`` if it holds anything but plain tensors in memory of the CPU."""
        if type(state) not in _DICTS or not state or not vars_of(state).keys() <= {"_metadata"}:
            return None
        values = list(state.values())
        kinds = set(map(type, values))
        keys: Any = list(state)
        key_types = set(map(type, keys))
        if kinds == {dict}:
            keys = [keys, list(map(tuple, values))]
            key_types |= set(map(type, chain.from_iterable(values)))
            values = list(chain.from_iterable(map(dict.values, values)))
            kinds = set(map(type, values))
        if kinds != {Tensor} or not key_types <= _KEYS:
            return None
        return cls(state, (type(state), keys, vars_of(state)), values)


Part = ConstantPart | TensorPart


def vars_of(state: Any) -> dict[str, Any]:
    """Return the attributes of a dict, which a plain one does not have."""
    return getattr(state, "__dict__", {})


def find_parts(tree: CheckpointTree) -> Iterator[Part]:
    """Yield the parts of a tree, in order."""
    for value in tree.values():
        if isinstance(value, Part):
            yield value
        elif type(value) is OpenDict:
            yield from find_parts(value)


def expand(tree: CheckpointTree, value_of: Callable[[Part], Any] = attrgetter("value")) -> CheckpointTree:
    """Return a tree of plain dicts, with the values of its parts, or what else a function returns for them."""
    return {key: _expand_value(value, value_of) for key, value in tree.items()}


def _expand_value(value: Any, value_of: Callable[[Part], Any]) -> Any:
    if isinstance(value, Part):
        return value_of(value)
    return expand(value, value_of) if type(value) is OpenDict else value
