"""The parts of a checkpoint's tree that rarely change between two saves, so that they are pickled once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trackopt.checkpoint.module_tensors import ModuleTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trackopt.utils.types import CheckpointTree


class OpenDict(dict[Any, Any]):
    """A dict whose values may be parts, or such dicts; a checkpoint holds it as a plain one."""


@dataclass(frozen=True)
class ConstantPart:
    """Plain values, which are compared as a whole.

    Attributes:
        value: The values.
    """

    value: Any

    @property
    def layout(self) -> Any:
        """What has to be equal for the part to be the same."""
        return self.value


@dataclass(frozen=True)
class TensorPart:
    """The state of an optimizer, of tensors only: a dict of dicts of them.

    Attributes:
        value: The state.
        layout: Its keys, in order.
        tensors: Its tensors, in order.
    """

    value: dict[Any, Any]
    layout: Any
    tensors: list[Tensor]

    @classmethod
    def of(cls, state: Any) -> TensorPart | None:
        """Return a state as a part; ``None`` if it holds anything but tensors of torch's own class."""
        if type(state) is not dict or set(map(type, state.values())) != {dict}:
            return None
        names = list(map(tuple, state.values()))
        tensors = list(chain.from_iterable(map(dict.values, state.values())))
        keys = chain(state, chain.from_iterable(names))
        if set(map(type, tensors)) != {Tensor} or not set(map(type, keys)) <= {str, int}:
            return None
        return cls(state, (list(state), names), tensors)


@dataclass(frozen=True)
class ModulePart:
    """The state of a module.

    Attributes:
        module: The live module.
        found: Its tensors.
    """

    module: nn.Module
    found: ModuleTensors

    @classmethod
    def of(cls, module: Any) -> ModulePart | None:
        """Return the state of a module as a part; ``None`` if it is none, or not of tensors of torch's own classes."""
        found = ModuleTensors.of(module) if isinstance(module, nn.Module) else None
        is_plain = found is not None and set(map(type, found.tensors)) <= {nn.Parameter, Tensor}
        return cls(module, found) if found is not None and found.tensors and is_plain else None

    @property
    def value(self) -> Any:
        """Its state dict."""
        return self.module.state_dict()

    @property
    def layout(self) -> Any:
        """What has to be equal for the part to be the same, besides its tensors."""
        return self.found.names, self.found.versions

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return self.found.tensors


Part = ConstantPart | TensorPart | ModulePart


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
