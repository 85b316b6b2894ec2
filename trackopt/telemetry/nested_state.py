"""Find the tensors in the containers and objects that an optimizer keeps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from trackopt.telemetry.quantized import dequantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    Path = tuple[object, ...]

_SEQUENCES = (list, tuple, deque, set, frozenset)
_NUMBERS = (int, float, complex, str, bytes, type(None))


def walk(state: Mapping[Any, Any], key: object, *, into_objects: bool) -> Iterator[tuple[Path, object]]:
    """Yield the tensors in an entry of a mapping, and the objects that contain none.

    Args:
        state: The mapping.
        key: The entry's key.
        into_objects: Search the attributes of objects of any class; those of dataclasses are searched in any case.

    Yields:
        The keys and attributes on the way to the tensor, and the tensor; positions in lists are no keys.

    Example:
        >>> [path for path, _ in walk({"blocks": [{"exp_avg": Tensor([1.0])}]}, "blocks", into_objects=True)]
        [('blocks', 'exp_avg')]
    """
    yield from _walk(dequantized(state, key), (key,), set(), into_objects=into_objects)


def is_list(value: object) -> bool:
    """Return whether a value is a sequence that contains no other containers, so that it may be one of tensors."""
    return isinstance(value, _SEQUENCES) and not any(
        _items(item) is not None or _is_object(item) for item in value if not isinstance(item, (Tensor, *_NUMBERS))
    )


def _walk(value: object, path: Path, seen: set[int], *, into_objects: bool) -> Iterator[tuple[Path, object]]:
    if isinstance(value, Tensor):
        yield path, value
    elif not isinstance(value, _NUMBERS) and id(value) not in seen:
        seen.add(id(value))  # what contains itself
        if (items := _items(value)) is not None:
            for key, item in items:
                yield from _walk(item, path if key is None else (*path, key), seen, into_objects=into_objects)
        elif into_objects and _is_object(value):
            yield from _walk_object(value, path, seen)
        else:
            yield path, value


def _walk_object(value: object, path: Path, seen: set[int]) -> Iterator[tuple[Path, object]]:
    """Yield the tensors in the attributes of an object, or the object itself if it cannot have any."""
    may_have_any = False
    for key, item in list(vars(value).items()):
        may_have_any = may_have_any or item is None or _items(item) is not None
        for end, leaf in _walk(item, (*path, key), seen, into_objects=True):
            if isinstance(leaf, Tensor):
                may_have_any = True
                yield end, leaf
    if not may_have_any:
        yield path, value


def _items(value: object) -> Iterator[tuple[object, object]] | None:
    """Return the keys and values in a container or dataclass, without keys in a list; ``None`` if it is neither."""
    if isinstance(value, Mapping):
        return ((key, dequantized(value, key)) for key in list(value))
    if isinstance(value, _SEQUENCES):
        return ((None, item) for item in list(value))
    if is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name, None)) for field in fields(value))
    return None


def _is_object(value: object) -> bool:
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Optimizer)
