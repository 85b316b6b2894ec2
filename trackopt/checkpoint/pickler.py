"""Pickle a captured tree as ``torch.save`` does: the ``data.pkl`` of a checkpoint, and its storages."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.serialization import location_tag

from trackopt.archive.unpickler.weights_only import is_allowed
from trackopt.checkpoint.meta import CLASSES, KEY
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from trackopt.utils.types import CheckpointTree

_PROTOCOL = 2  # torch.save's


@dataclass(frozen=True)
class PickledTree:
    """A pickled tree.

    Attributes:
        data: The pickle.
        storages: The storages in the order of their keys: the n-th is the record ``data/n``.
        globals: Every name of a class, function or dtype in the pickle.
    """

    data: bytes
    storages: list[torch.UntypedStorage]
    globals: frozenset[str]


def dump_checkpoint(tree: CheckpointTree) -> PickledTree:
    """Pickle the tree of a checkpoint; it notes the names that torch accepts only because they were allowed here.

    Raises:
        UsageError: As `dump_tree`, or a state holds an object that torch's safe loader refuses.
    """
    pickled = dump_tree(tree)
    special = sorted(name for name in pickled.globals if not is_allowed(name))
    if refused := [name for name in special if name not in _allowed_here()]:
        raise UsageError(
            f"a state holds a {refused[0]}, which torch.load(weights_only=True) refuses; "
            "let its state_dict() return numbers, strings, tensors, lists and dicts"
        )
    if special and KEY in tree:
        tree[KEY][CLASSES] = special
        pickled = dump_tree(tree)
    return pickled


def dump_tree(tree: CheckpointTree) -> PickledTree:
    """Pickle a tree.

    Raises:
        UsageError: Two tensors of different dtypes share their memory, which no reader of torch's format accepts.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(tree)
    return PickledTree(file.getvalue(), pickler.storages, frozenset(pickler.globals))


class _Pickler(pickle.Pickler):
    """Lets tensors reduce themselves as torch defines it, and replaces their storages by keys."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self.globals: set[str] = set()
        self._keys: dict[int, str] = {}
        self._kinds: dict[str, Any] = {}

    def reducer_override(self, value: Any) -> Any:
        """Note the name of a class or function, which is pickled as such."""
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
            self.globals.add(f"{value.__module__}.{value.__qualname__}")
        elif isinstance(value, (torch.dtype, torch.qscheme)):
            self.globals.add(str(value))
        return NotImplemented

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


def _allowed_here() -> set[str]:
    """Return the names that this process has allowed by ``torch.serialization.add_safe_globals``."""
    allowed = (entry[0] if isinstance(entry, tuple) else entry for entry in torch.serialization.get_safe_globals())
    return {f"{each.__module__}.{each.__qualname__}" for each in allowed}
