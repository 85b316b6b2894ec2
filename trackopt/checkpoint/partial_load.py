"""Load some keys of a run's checkpoint from a remote file: only their bytes are fetched and verified."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch._weights_only_unpickler import Unpickler  # the one that torch.load(weights_only=True) uses

from trackopt.archive import verify
from trackopt.archive.tree import tensors
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from trackopt.archive import Archive
    from trackopt.archive.formats.zip_source import ZipSource
    from trackopt.archive.tree import Storage
    from trackopt.utils.types import CheckpointTree

#: The errors that the unpickler raises for a malformed pickle.
_UNPICKLING_ERRORS = (
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def load_keys(opened: Archive, source: ZipSource, keys: Collection[str]) -> CheckpointTree:
    """Return some keys of a checkpoint with the values that ``reader.load`` returns.

    Raises:
        CheckpointError: The bytes of these keys are damaged.
    """
    part = {key: node for key, node in opened.tree.items() if key in keys}
    wanted = {tensor.storage.key: tensor.storage for _, tensor in tensors(part)}
    if problems := [*verify.find_problems(opened, crc=False), *source.verify_checksums(wanted.values())]:
        raise CheckpointError(f"{opened.path}: cannot be used ({problems[0]})")
    unpickler: Any = Unpickler(io.BytesIO(source.read_pickle()), encoding="utf-8")
    unpickler.persistent_load = _Storages(source, wanted).load
    try:
        tree: CheckpointTree = unpickler.load()
    except _UNPICKLING_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{opened.path}: cannot be loaded ({reason})") from error
    return {key: value for key, value in tree.items() if key in part}


class _Storages:
    """The storages of a pickle: the wanted ones with their bytes, the others on the meta device."""

    def __init__(self, source: ZipSource, wanted: Mapping[str, Storage]) -> None:
        self._source = source
        self._wanted = wanted
        self._loaded: dict[str, Any] = {}

    def load(self, name: tuple[Any, ...]) -> Any:
        """Return a storage by ``("storage", type, key, location, elements)``."""
        _, kind, key, _, elements = name
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in self._loaded:
            self._loaded[key] = self._read_untyped(key, elements * dtype.itemsize)
        typed: Any = torch.TypedStorage
        return typed(wrap_storage=self._loaded[key], dtype=dtype, _internal=True)

    def _read_untyped(self, key: str, size: int) -> Any:
        untyped: Any = torch.UntypedStorage
        if key not in self._wanted or not size:
            return untyped(size, device="cpu" if key in self._wanted else "meta")
        content = bytearray(self._source.read(self._wanted[key], 0, size))
        return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
