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
from trackopt.checkpoint.parts import OpenDict, Part
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trackopt.utils.types import CheckpointTree

_PROTOCOL = 2  # torch.save's
_LEAST_BYTES = 3  # of an object that gets a number in the memo: one operation, and the one that stores it


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


def dump_checkpoint(tree: CheckpointTree, parts: PickledParts | None = None) -> PickledTree:
    """Pickle the tree of a checkpoint; it notes the names that torch accepts only because they were allowed here.

    Args:
        tree: The tree.
        parts: The pickles of its parts, if it has any.

    Raises:
        UsageError: As `dump_tree`, or a state holds an object that torch's safe loader refuses.
    """
    pickled = dump_tree(tree, parts)
    special = sorted(name for name in pickled.globals if not is_allowed(name))
    if refused := [name for name in special if name not in _allowed_here()]:
        raise UsageError(
            f"a state holds a {refused[0]}, which torch.load(weights_only=True) refuses; "
            "let its state_dict() return numbers, strings, tensors, lists and dicts"
        )
    if special and KEY in tree:
        tree[KEY][CLASSES] = special
        pickled = dump_tree(tree, parts)
    return pickled


def dump_tree(tree: CheckpointTree, parts: PickledParts | None = None) -> PickledTree:
    """Pickle a tree.

    Args:
        tree: The tree.
        parts: The pickles of its parts, if it has any.

    Raises:
        UsageError: Two tensors of different dtypes share their memory, which no reader of torch's format accepts.
    """
    file = io.BytesIO()
    if parts is None:
        pickler = _Pickler(file)
        pickler.dump(tree)
        return PickledTree(file.getvalue(), pickler.storages, frozenset(pickler.globals))
    pickler = parts.pickler.continued(file)
    pieces = list(_with_parts(tree, pickler, iter(parts.pickles)))
    if file.tell() > parts.memo_size * _LEAST_BYTES:
        raise PartsOutgrown
    data = b"".join((pickle.PROTO, bytes((_PROTOCOL,)), *pieces, pickle.STOP))
    return PickledTree(data, pickler.storages, frozenset(pickler.globals))


class PartsOutgrown(Exception):
    """The rest of a tree has become so large that its pickle may use the memo's numbers of its parts."""


class PickledParts:
    """The pickles of the parts of a tree, for `dump_tree`.

    A pickle refers to earlier objects by number, in its memo. The parts have the numbers from ``memo_size`` on, and
    what is pickled at each save has the numbers before it.

    Args:
        values: The values of the parts, in order.
        memo_size: How many numbers to leave to the rest.

    Attributes:
        pickles: The pickle of each part, without its first and last operation.
        pickler: The pickler of the parts; it knows their storages and names.
        memo_size: As above.
    """

    def __init__(self, values: Iterable[Any], memo_size: int) -> None:
        file = io.BytesIO()
        self.memo_size = memo_size
        self.pickler = _Pickler(file)
        fillers = [object() for _ in range(memo_size)]
        self.pickler.memo = {id(filler): (number, filler) for number, filler in enumerate(fillers)}
        self.pickles = [_dump_piece(self.pickler, value) for value in values]
        self.pickler.clear_memo()


def _with_parts(tree: CheckpointTree, pickler: _Pickler, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the operations that build a dict, some values of which are pickled already."""
    yield pickle.EMPTY_DICT + pickle.MARK
    for key, value in tree.items():
        yield _dump_piece(pickler, key)
        if isinstance(value, Part):
            yield next(parts)
        elif type(value) is OpenDict:
            yield from _with_parts(value, pickler, parts)
        else:
            yield _dump_piece(pickler, value)
    yield pickle.SETITEMS


def _dump_piece(pickler: _Pickler, value: Any) -> bytes:
    """Return the operations that build a value; those of a pickler share their memo."""
    begin = pickler.file.tell()
    pickler.dump(value)
    return pickler.file.getbuffer()[begin + 2 : -1].tobytes()


class _Pickler(pickle.Pickler):
    """Lets tensors reduce themselves as torch defines it, and replaces their storages by keys."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.file = file
        self.storages: list[torch.UntypedStorage] = []
        self.globals: set[str] = set()
        self._keys: dict[int, str] = {}
        self._kinds: dict[str, Any] = {}

    def continued(self, file: io.BytesIO) -> _Pickler:
        """Return a pickler with an empty memo that knows the storages and names of this one."""
        other = _Pickler(file)
        other.storages, other.globals = list(self.storages), set(self.globals)
        other._keys, other._kinds = dict(self._keys), dict(self._kinds)
        return other

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
