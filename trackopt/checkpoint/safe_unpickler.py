"""Unpickle as ``torch.load(weights_only=True)`` does, with storages from elsewhere."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch._weights_only_unpickler import Unpickler  # the one that torch.load(weights_only=True) uses

if TYPE_CHECKING:
    from collections.abc import Callable

#: The errors that the unpickler raises for a pickle that it refuses.
_ERRORS = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)


def unpickle(data: bytes, read_storage: Callable[[str, int], torch.UntypedStorage]) -> Any:
    """Return the object of a pickle.

    Args:
        data: The pickle.
        read_storage: Returns a storage by its key and its size in bytes.

    Raises:
        pickle.UnpicklingError: Torch refuses it.
    """
    loaded: dict[str, torch.UntypedStorage] = {}
    kinds: dict[str, Any] = {}

    def load(name: tuple[Any, ...]) -> Any:
        """Return a storage by ``("storage", type, key, location, elements)``."""
        _, kind, key, _, elements = name
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if kinds.setdefault(key, kind) is not kind:
            raise pickle.UnpicklingError(f"tensors disagree on the dtype of storage {key!r}")
        if key not in loaded:
            loaded[key] = read_storage(key, elements * dtype.itemsize)
        typed: Any = torch.TypedStorage
        return typed(wrap_storage=loaded[key], dtype=dtype, _internal=True)

    file = io.BytesIO(data)
    unpickler: Any = Unpickler(file, encoding="utf-8")
    unpickler.persistent_load = load
    try:
        value = unpickler.load()
        if file.tell() < len(data):
            raise pickle.UnpicklingError(f"{len(data) - file.tell()} bytes follow it")
        return value
    except _ERRORS as error:
        raise pickle.UnpicklingError(str(error).partition("\n")[0]) from error
