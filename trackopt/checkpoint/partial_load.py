"""A part of a run's checkpoint whose bytes are elsewhere: nothing else of it is fetched, or checked."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch._weights_only_unpickler import Unpickler  # the one that torch.load(weights_only=True) has

from trackopt.archive import verify
from trackopt.archive.tree import tensors
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from trackopt.archive import Archive
    from trackopt.archive.formats.zip_source import ZipSource
    from trackopt.archive.tree import Storage

#: What the unpickler raises of a pickle that makes no sense.
_UNPICKLING_ERRORS = (
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def load_keys(opened: Archive, source: ZipSource, keys: Collection[str]) -> dict[str, Any]:
    """What stands under some keys of a checkpoint, the same that ``store.load`` finds there.

    Raises:
        CheckpointError: What is asked for is damaged.
    """
    part = {key: node for key, node in opened.tree.items() if key in keys}
    wanted = {tensor.storage.key: tensor.storage for _, tensor in tensors(part)}
    if problems := [*verify.find_problems(opened, crc=False), *source.verify_checksums(wanted.values())]:
        raise CheckpointError(f"{opened.path}: cannot be used ({problems[0]})")
    unpickler: Any = Unpickler(io.BytesIO(source.read_pickle()), encoding="utf-8")
    unpickler.persistent_load = _Storages(source, wanted).find
    try:
        tree: dict[str, Any] = unpickler.load()
    except _UNPICKLING_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{opened.path}: cannot be loaded ({reason})") from error
    return {key: value for key, value in tree.items() if key in part}


class _Storages:
    """What a pickle names as its storages: the wanted ones with their bytes, the others without."""

    def __init__(self, source: ZipSource, wanted: Mapping[str, Storage]) -> None:
        self._source = source
        self._wanted = wanted
        self._found: dict[str, Any] = {}

    def find(self, name: tuple[Any, ...]) -> Any:
        """A storage by ``("storage", type, key, location, elements)``."""
        _, kind, key, _, elements = name
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in self._found:
            self._found[key] = self._untyped(key, elements * dtype.itemsize)
        typed: Any = torch.TypedStorage
        return typed(wrap_storage=self._found[key], dtype=dtype, _internal=True)

    def _untyped(self, key: str, size: int) -> Any:
        untyped: Any = torch.UntypedStorage
        if key not in self._wanted or not size:
            return untyped(size, device="cpu" if key in self._wanted else "meta")
        return torch.frombuffer(
            bytearray(self._source.read(self._wanted[key], 0, size)), dtype=torch.uint8
        ).untyped_storage()
