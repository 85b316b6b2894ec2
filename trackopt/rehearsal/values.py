"""The values in the user's variables that a step depends on: numbers, tensors, and containers of them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trackopt.rehearsal.fingerprint import fingerprint
from trackopt.rehearsal.liveness import carried_names
from trackopt.rehearsal.user_code import is_users_class, user_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_VALUES = 200
_MAX_ELEMENTS = 250_000  # of a tensor; a larger one is data
_MAX_ITEMS = 50  # of a container; of a longer list the last ones count
_MAX_DEPTH = 3  # of containers, and of objects
_PLAIN = (bool, int, float, complex, np.generic, type(None))


def values(*, all_names: bool = False) -> dict[str, str]:
    """Return the values in the variables of the user's running functions and in their objects' attributes.

    Args:
        all_names: Include variables that are assigned again before they are read.

    Returns:
        By name: a number as text; a tensor or a container of numbers as its kind and a fingerprint.
    """
    texts: dict[str, str] = {}
    seen: set[int] = set()
    for frame in user_frames():
        names = frozenset(frame.f_locals) if all_names else carried_names(frame)
        for name, value in list(frame.f_locals.items()):
            if name not in names or name.startswith("_"):
                continue
            for path, part in ((name, value), *_attributes(name, value, seen)):
                if path not in texts and len(texts) < _MAX_VALUES and (text := _try_describe(part)) is not None:
                    texts[path] = text
    return texts


def carried() -> set[str]:
    """Return the variables of the user's running functions that are read again before they are assigned."""
    return {name for frame in user_frames() for name in carried_names(frame)}


def root(path: str) -> str:
    """Return the variable in which a value was found: ``meter`` for ``meter.total``."""
    return path.partition(".")[0]


def loop_counters() -> dict[str, int]:
    """Return the integers that the user's loops assign anew in each iteration, as ``enumerate`` does."""
    counters: dict[str, int] = {}
    for frame in user_frames():
        again = carried_names(frame)
        for name, value in list(frame.f_locals.items()):
            if type(value) is int and name not in again and len(counters) < _MAX_VALUES:
                counters.setdefault(name, value)
    return counters


def _attributes(name: str, value: Any, seen: set[int], depth: int = _MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of the user's objects, and what a module keeps outside of its ``state_dict``; each once."""
    if id(value) in seen or not depth:
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        for path, module in value.named_modules(prefix=name):
            attributes = vars(module) if is_users_class(type(module)) else {}
            buffers = {key: module._buffers.get(key) for key in module._non_persistent_buffers_set}
            own = {key: part for key, part in attributes.items() if not key.startswith("_") and key != "training"}
            yield from ((f"{path}.{key}", part) for key, part in (own | buffers).items())
    elif is_users_class(type(value)):
        seen.add(id(value))
        for key, part in list(getattr(value, "__dict__", {}).items()):
            if not key.startswith("_"):
                yield f"{name}.{key}", part
                yield from _attributes(f"{name}.{key}", part, seen, depth - 1)


def _try_describe(value: Any) -> str | None:
    try:
        return _describe(value)
    except Exception:  # noqa: BLE001 - a tensor of an unusual kind cannot be read, and is only a hint here
        return None


def _describe(value: Any) -> str | None:
    """Return a number as text, a tensor or container as kind and fingerprint; ``None`` for anything else."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if not _is_plain(value, _MAX_DEPTH):
        return None
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return repr(value.item())
        kind = f"tensor {tuple(value.shape)}"
    else:
        kind = f"array {value.shape}" if isinstance(value, np.ndarray) else f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (list, tuple, deque)):
        value = [len(value), *list(value)[-_MAX_ITEMS:]]
    return f"{kind} #{fingerprint(value):08x}"


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        trained = isinstance(value, nn.Parameter) or (value.is_leaf and value.requires_grad)
        return not trained and not value.is_meta and value.numel() <= _MAX_ELEMENTS
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject and value.size <= _MAX_ELEMENTS
    if isinstance(value, dict):
        return depth > 0 and len(value) <= _MAX_ITEMS and all(_is_plain(part, depth - 1) for part in value.values())
    if isinstance(value, (list, tuple, deque)):
        return depth > 0 and all(_is_plain(part, depth - 1) for part in list(value)[-_MAX_ITEMS:])
    return isinstance(value, (*_PLAIN, str)) and depth < _MAX_DEPTH
