"""A captured tree as ``torch.save`` pickles it: the ``data.pkl`` of a checkpoint, and the storages that it names."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.serialization import location_tag

from trackopt.errors import UsageError

_PROTOCOL = 2  # torch.save's


def pickled(tree: dict[str, Any]) -> tuple[bytes, list[torch.UntypedStorage]]:
    """The pickle, and the storages in the order of their keys: the n-th is the record ``data/n``.

    Raises:
        UsageError: Two tensors share their memory and are of different dtypes, which no reader of torch's format takes.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(tree)
    return file.getvalue(), pickler.storages


class _Pickler(pickle.Pickler):
    """Tensors reduce themselves as torch has them; their storages stay out, under a number."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, str] = {}
        self._kinds: dict[str, Any] = {}

    def persistent_id(self, thing: Any) -> tuple[Any, ...] | None:
        if isinstance(thing, torch.storage.TypedStorage):
            storage, kind = thing._untyped_storage, thing._pickle_storage_type()  # type: ignore[no-untyped-call]  # torch's
            count = thing._size()  # type: ignore[no-untyped-call]  # torch leaves it so
        elif isinstance(thing, torch.UntypedStorage):
            storage, kind, count = thing, "UntypedStorage", thing.nbytes()
        else:
            return None
        key = self._keys.setdefault(storage._cdata, str(len(self._keys)))
        if len(self._keys) > len(self.storages):
            self.storages.append(storage)  # held, so that no other one can have its address
        if self._kinds.setdefault(key, kind) != kind:
            raise UsageError(
                f"a {self._kinds[key]} and a {kind} share their memory, which a checkpoint cannot hold; "
                "let a state_dict() return a clone() of one of them"
            )
        return "storage", getattr(torch, kind), key, location_tag(storage), count
