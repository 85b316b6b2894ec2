"""Pickle a captured tree as ``torch.save`` does: the ``data.pkl`` of a checkpoint, and its storages."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import location_tag

from trackopt.errors import UsageError

if TYPE_CHECKING:
    from trackopt.utils.types import CheckpointTree

_PROTOCOL = 2  # torch.save's


def dump_tree(tree: CheckpointTree) -> tuple[bytes, list[torch.UntypedStorage]]:
    """Return the pickle, and the storages in the order of their keys: the n-th is the record ``data/n``.

    Raises:
        UsageError: Two tensors of different dtypes share their memory, which no reader of torch's format accepts.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(tree)
    return file.getvalue(), pickler.storages


class _Pickler(pickle.Pickler):
    """Lets tensors reduce themselves as torch defines it, and replaces their storages by keys."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, str] = {}
        self._kinds: dict[str, Any] = {}

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, torch.storage.TypedStorage):
            storage, kind = value._untyped_storage, value._pickle_storage_type()  # type: ignore[no-untyped-call]  # torch's
            count = value._size()  # type: ignore[no-untyped-call]  # torch leaves it so
        elif isinstance(value, torch.UntypedStorage):
            storage, kind, count = value, "UntypedStorage", value.nbytes()
        else:
            return None
        key = self._keys.setdefault(storage._cdata, str(len(self._keys)))
        if len(self._keys) > len(self.storages):
            self.storages.append(storage)  # held, so that no other storage can get its address
        if self._kinds.setdefault(key, kind) != kind:
            raise UsageError(
                f"a {self._kinds[key]} and a {kind} share their memory, which a checkpoint cannot hold; "
                "let a state_dict() return a clone() of one of them"
            )
        return "storage", getattr(torch, kind), key, location_tag(storage), count
