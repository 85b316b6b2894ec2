"""A tree of plain values and tensors as a pickle that ``torch.load(weights_only=True)`` accepts.

The inverse of `trackopt.archive.unpickler`, without torch: the opcodes are written by hand, since a pickler of the
standard library imports the names that it writes. The only names in the pickle are those of tensors and storages; any
other object is skipped and reported.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import BYTES, Tensor
from trackopt.archive.unpickler.tensor_constructors import STORAGES

if TYPE_CHECKING:
    from collections.abc import Callable

_STORAGE_KINDS = {dtype: kind for kind, dtype in STORAGES.items() if kind != "Untyped"}
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
_FIXED_SIZE_SCALARS = frozenset((type(None), bool, float))
_MAX_INTEGER_BYTES = 255  # that torch accepts
_MAX_TEXT_BYTES = 32 << 20  # it is copied several times
_MIN_MEMOIZED_BYTES = 65
_MIN_SEPARATE_BYTES = 1 << 16
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


class SafePickler:
    """A pickler that writes one tree.

    Args:
        is_intact: Returns whether a tensor can be written.

    Attributes:
        skipped: The paths of the values that were not written.
        storages: The number of each storage that is needed, by its key; the pickle uses the numbers.
        tensors: How many tensors were written.
    """

    def __init__(self, is_intact: Callable[[Tensor], bool]) -> None:
        self.skipped: list[str] = []
        self.storages: dict[str, int] = {}
        self.tensors = 0
        self._is_intact = is_intact
        self._chunks: list[bytes] = []
        self._chunk = bytearray()
        self._memo: dict[int, int] = {}

    def dump(self, tree: Any) -> list[bytes]:
        """Return the pickle of a tree, in chunks; a container of skipped values stays, empty."""
        self._write(b"\x80\x02")
        self._write_value(tree, ())
        self._write(b".")
        return [*self._chunks, bytes(self._chunk)]

    def _write(self, data: bytes) -> None:
        if len(data) < _MIN_SEPARATE_BYTES:
            self._chunk += data
        else:
            self._chunks += [bytes(self._chunk), data]
            self._chunk = bytearray()

    def _write_value(self, node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Tensor) and self._is_kept(node):
            self.tensors += 1
            if not self._write_reference(node):
                self._write(self._encode_tensor(node))
                self._memoize(node)
        elif isinstance(node, dict):
            self._write_dict(node, path)
        elif isinstance(node, list | tuple):
            self._write_items(node, path)
        elif type(node) in _SCALARS and _is_accepted(node):
            self._write_scalar(node)
        else:
            self.skipped.append(".".join(path))
            self._write(b"N")

    def _write_dict(self, node: dict[Any, Any], path: tuple[str, ...]) -> None:
        self._write(b"}(")
        for key, value in node.items():
            if type(value) not in _SCALARS:
                value_path = (*path, key if isinstance(key, str) else repr(key))
                if not (_is_accepted(key) and self._is_kept(value)):
                    self.skipped.append(".".join(value_path))
                    continue
                self._write_key(key)
                self._write_value(value, value_path)
            elif _is_accepted(key) and _is_accepted(value):
                self._write_key(key)
                self._write_scalar(value)
            else:
                self.skipped.append(".".join((*path, str(key))))
        self._write(b"u")

    def _is_kept(self, value: Any) -> bool:
        """Return whether a value can be written; a dictionary drops other values, a list has None instead."""
        if isinstance(value, Tensor):
            return value.kind != BYTES and not value.dtype.startswith("q") and self._is_intact(value)
        return isinstance(value, dict | list | tuple)

    def _write_items(self, node: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> None:
        if _FIXED_SIZE_SCALARS.issuperset(map(type, node)):
            self._write(pickle.dumps(node, 2)[2:-1])  # in C; it uses number 0 of the memo
            return
        self._write(b"](" if isinstance(node, list) else b"(")
        for index, item in enumerate(node):
            if type(item) in _SCALARS and _is_accepted(item):
                self._write_scalar(item)
            else:
                self._write_value(item, (*path, str(index)))
        self._write(b"e" if isinstance(node, list) else b"t")

    def _write_key(self, key: Any) -> None:
        if isinstance(key, tuple):
            self._write_items(key, ())
        else:
            self._write_scalar(key)

    def _write_scalar(self, value: Any) -> None:
        if not self._write_reference(value):
            data = _encode_scalar(value)
            self._write(data)
            if len(data) >= _MIN_MEMOIZED_BYTES:
                self._memoize(value)

    def _write_reference(self, value: Any) -> bool:
        """Write a reference to a value that was written before; return False if it was not."""
        number = self._memo.get(id(value))
        if number is not None:
            self._write(b"j" + struct.pack("<I", number))
        return number is not None

    def _memoize(self, value: Any) -> None:
        self._memo[id(value)] = len(self._memo) + 1
        self._write(b"r" + struct.pack("<I", self._memo[id(value)]))

    def _encode_tensor(self, tensor: Tensor) -> bytes:
        is_typed = tensor.dtype in _STORAGE_KINDS  # other dtypes have no class of storage
        storage = b"(" + self._encode_storage(tensor, is_typed) + b"tQ"
        layout = _encode_scalar(tensor.offset) + _encode_sizes(tensor.shape) + _encode_sizes(tensor.stride)
        rest = _encode_scalar(tensor.requires_grad) + _EMPTY_ORDERED_DICT
        if not is_typed:
            rest += f"ctorch\n{tensor.dtype}\n".encode()
        if bits := b"".join(_encode_scalar(name) + b"\x88" for name in ("conj", "neg") if getattr(tensor, name)):
            rest += b"}(" + bits + b"u"
        version = 2 if is_typed else 3
        data = f"ctorch._utils\n_rebuild_tensor_v{version}\n(".encode() + storage + layout + rest + b"tR"
        if not tensor.is_parameter:
            return data
        flags = _encode_scalar(tensor.requires_grad) + _EMPTY_ORDERED_DICT
        return b"ctorch._utils\n_rebuild_parameter\n" + data + flags + b"\x87R"

    def _encode_storage(self, tensor: Tensor, is_typed: bool) -> bytes:
        """Return the persistent id's items: ``"storage"``, class, key, location, number of elements."""
        number = self.storages.setdefault(tensor.storage.key, len(self.storages))
        kind = f"torch\n{_STORAGE_KINDS[tensor.dtype]}Storage" if is_typed else "torch.storage\nUntypedStorage"
        count = tensor.storage.nbytes // tensor.itemsize if is_typed else tensor.storage.nbytes
        name = _encode_scalar("storage") + f"c{kind}\n".encode() + _encode_scalar(str(number))
        return name + _encode_scalar("cpu") + _encode_scalar(count)


def _is_accepted(value: Any) -> bool:
    """Return whether torch accepts a plain value or a dictionary's key."""
    if isinstance(value, int):
        return value.bit_length() < 8 * _MAX_INTEGER_BYTES
    if isinstance(value, str | bytes):
        return len(value) <= _MAX_TEXT_BYTES
    return type(value) in _SCALARS or (isinstance(value, tuple) and all(map(_is_accepted, value)))


def _encode_sizes(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_encode_scalar, numbers)) + b"t"


def _encode_scalar(value: Any) -> bytes:
    """Return the opcodes for a plain value."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _encode_integer(value)
    if isinstance(value, float):
        return struct.pack(">cd", b"G", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return struct.pack("<cI", b"X", len(data)) + data
    # Protocol 2 has no opcode for bytes.
    return b"c_codecs\nencode\n" + _encode_scalar(value.decode("latin1")) + _encode_scalar("latin1") + b"\x86R"


def _encode_integer(value: int) -> bytes:
    if 0 <= value < 256:
        return struct.pack("<cB", b"K", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = pickle.encode_long(value)
    return struct.pack("<cB", b"\x8a", len(data)) + data
