"""Unpickle a tree of plain values and tensors fast: in C, with a short list of names.

A pickle can run only what its names refer to. Here these are ``OrderedDict``, dtypes, the classes of storages, each
replaced by its dtype, and torch's function that builds a tensor, replaced by one that builds nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

#: The errors that a pickle of other objects, or an invalid one, ends in.
_ERRORS = (AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def unpickle(data: bytes, read_storage: Callable[[str, int], torch.UntypedStorage]) -> Any:
    """Return the object of a pickle, as `safe_unpickler.unpickle` does.

    Use it for the checkpoints of the run itself: nothing limits the memory that a crafted pickle may take.

    Args:
        data: The pickle.
        read_storage: Returns a storage by its key and its size in bytes.

    Raises:
        pickle.UnpicklingError: It holds something else than plain values and tensors.
    """
    file = io.BytesIO(data)
    try:
        value = _Unpickler(file, read_storage).load()
    except _ERRORS as error:
        raise pickle.UnpicklingError(str(error).partition("\n")[0]) from error
    if not data.endswith(pickle.STOP) or file.tell() < len(data):
        raise pickle.UnpicklingError("bytes follow it")
    return value


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, read_storage: Callable[[str, int], torch.UntypedStorage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._read_storage = read_storage
        self._loaded: dict[str, tuple[torch.UntypedStorage, torch.dtype]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _build_tensor
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if found in torch._storage_classes and found is not torch.UntypedStorage:
            return found._dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")

    def persistent_load(self, name: Any) -> Any:
        """Return a storage and its dtype by ``("storage", dtype, key, location, elements)``."""
        _, dtype, key, _, elements = name
        storage, known = self._loaded.get(key) or (self._read_storage(key, elements * dtype.itemsize), dtype)
        if known is not dtype:
            raise pickle.UnpicklingError(f"tensors disagree on the dtype of storage {key!r}")
        self._loaded[key] = storage, dtype
        return storage, dtype


def _build_tensor(
    source: tuple[torch.UntypedStorage, torch.dtype], offset: Any, size: Any, stride: Any, grad: Any, hooks: Any
) -> torch.Tensor:
    """Build a tensor as ``torch._utils._rebuild_tensor_v2`` does; lazily conjugated or negated ones are not plain."""
    storage, dtype = source
    if hooks or type(grad) is not bool:
        raise pickle.UnpicklingError("a tensor has hooks")
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, size, stride)
    return tensor.requires_grad_() if grad else tensor
