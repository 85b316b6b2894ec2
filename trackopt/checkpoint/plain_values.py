"""Numbers and texts of any class as those of the built-in types, and the keys of dictionaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The built-in types whose subclasses are saved as plain values.
BASES = (int, float, complex, str, bytes)
#: The types whose values are saved as they are.
ATOMS = frozenset((
    type(None), bool, int, float, complex, str,
    torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device, torch.Size,
))  # fmt: skip

_NO_KEY = object()


def plain_keys(keys: Iterable[Any]) -> list[Any] | None:
    """Return keys of plain types that are equal to the given ones; ``None`` if there are none."""
    keys = list(keys)
    if set(map(type, keys)) <= ATOMS:
        return keys
    plain = [_plain_key(key) for key in keys]
    return None if any(key is _NO_KEY for key in plain) or len(set(plain)) < len(plain) else plain


def _plain_key(key: Any) -> Any:
    if type(key) in ATOMS:
        return key
    if type(key) is tuple:
        parts = [_plain_key(part) for part in key]
        return _NO_KEY if any(part is _NO_KEY for part in parts) else tuple(parts)
    if isinstance(key, np.generic):
        key = key.item()
    plain = to_base(key) if isinstance(key, BASES) else _NO_KEY
    is_empty = type(plain) is bytes and not plain
    return plain if plain == key and hash(plain) == hash(key) and not is_empty else _NO_KEY


def to_base(value: Any) -> Any:
    """Return a number or text as the built-in type that its class extends, without calling the class's own methods."""
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return complex.__pos__(value)
    return str.__str__(value) if isinstance(value, str) else bytes.__getitem__(value, slice(None))
