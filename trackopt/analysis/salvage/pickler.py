"""A tree of plain values and tensors as a pickle that ``torch.load(weights_only=True)`` takes.

The way back from `trackopt.archive.unpickler.machine`, written without torch: operations are put together by hand,
and the only names in it are those of tensors and storages. What has no such form (an object of a class) is left out
and reported.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Tensor
from trackopt.archive.unpickler.constructors import STORAGES

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS = {dtype: kind for kind, dtype in STORAGES.items() if kind != "Untyped"}
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
_SMALL = frozenset((type(None), bool, float))
_LONGEST_INTEGER = 255  # bytes; torch takes no longer one
_REMEMBERED = 64
_LARGE = 1 << 16
_ORDERED = b"ccollections\nOrderedDict\n)R"


class SafePickler:
    """Makes one pickle.

    Args:
        keep: Told a tensor, whether it is to be written.

    Attributes:
        left_out: The paths of what was not written.
        storages: The keys of the storages that are needed, each once; the pickle calls them by their numbers.
        tensors: How many tensors were written.
    """

    def __init__(self, keep: Callable[[Tensor], bool]) -> None:
        self.left_out: list[str] = []
        self.storages: dict[str, int] = {}
        self.tensors = 0
        self._keep = keep
        self._parts: list[bytes] = []
        self._last = bytearray()
        self._memo: dict[int, int] = {}

    def dump(self, tree: Any) -> list[bytes]:
        """The pickle of a tree, in pieces; what holds nothing any more is an empty container."""
        self._write(b"\x80\x02")
        self._value(tree, ())
        self._write(b".")
        return [*self._parts, bytes(self._last)]

    def _write(self, data: bytes) -> None:
        if len(data) < _LARGE:
            self._last += data
        else:
            self._parts += [bytes(self._last), data]
            self._last = bytearray()

    def _value(self, node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Tensor) and self._is_representable(node):
            self.tensors += 1
            if not self._memoized(node):
                self._write(self._tensor(node))
                self._remember(node)
        elif isinstance(node, dict):
            self._dictionary(node, path)
        elif isinstance(node, list | tuple):
            self._items(node, path)
        elif type(node) in _SCALARS and _opcode_for(node):
            self._scalar(node)
        else:
            self.left_out.append(".".join(path))
            self._write(b"N")

    def _dictionary(self, node: dict[Any, Any], path: tuple[str, ...]) -> None:
        self._write(b"}(")
        for key, value in node.items():
            if type(value) not in _SCALARS:
                below = (*path, key if isinstance(key, str) else repr(key))
                if not (_opcode_for(key) and self._is_representable(value)):
                    self.left_out.append(".".join(below))
                    continue
                self._key(key)
                self._value(value, below)
            elif _opcode_for(key) and _opcode_for(value):
                self._key(key)
                self._scalar(value)
            else:
                self.left_out.append(".".join((*path, str(key))))
        self._write(b"u")

    def _is_representable(self, value: Any) -> bool:
        """Whether a dictionary's entry is kept; in a list its place would be, with nothing in it."""
        if isinstance(value, Tensor):
            return self._keep(value) and not value.dtype.startswith("q")
        return isinstance(value, dict | list | tuple)

    def _items(self, node: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> None:
        if _SMALL.issuperset(map(type, node)):
            self._write(pickle.dumps(node, 2)[2:-1])  # in C; it takes the memo's number 0
            return
        self._write(b"](" if isinstance(node, list) else b"(")
        for index, item in enumerate(node):
            if type(item) in _SCALARS and _opcode_for(item):
                self._scalar(item)
            else:
                self._value(item, (*path, str(index)))
        self._write(b"e" if isinstance(node, list) else b"t")

    def _key(self, key: Any) -> None:
        if isinstance(key, tuple):
            self._items(key, ())
        else:
            self._scalar(key)

    def _scalar(self, value: Any) -> None:
        if not self._memoized(value):
            data = _is_exact_type(value)
            self._write(data)
            if len(data) > _REMEMBERED:
                self._remember(value)

    def _memoized(self, value: Any) -> bool:
        """Write a reference to what was written before: a few long values may stand in very many places."""
        known = self._memo.get(id(value))
        if known is not None:
            self._write(b"j" + struct.pack("<I", known))
        return known is not None

    def _remember(self, value: Any) -> None:
        self._memo[id(value)] = len(self._memo) + 1
        self._write(b"r" + struct.pack("<I", self._memo[id(value)]))

    def _tensor(self, tensor: Tensor) -> bytes:
        number = self.storages.setdefault(tensor.storage.key, len(self.storages))
        typed = tensor.dtype in _KINDS
        kind = f"torch\n{_KINDS[tensor.dtype]}Storage" if typed else "torch.storage\nUntypedStorage"
        count = tensor.storage.nbytes // tensor.itemsize if typed else tensor.storage.nbytes
        place = b"(" + _is_exact_type("storage") + f"c{kind}\n".encode() + _is_exact_type(str(number))
        storage = place + _is_exact_type("cpu") + _is_exact_type(count) + b"tQ"
        layout = (
            _is_exact_type(tensor.offset)
            + _sizes(tensor.shape)
            + _sizes(tensor.stride)
            + _is_exact_type(tensor.requires_grad)
        )
        bits = b"".join(_is_exact_type(name) + b"\x88" for name in ("conj", "neg") if getattr(tensor, name))
        rest = (
            _ORDERED + (b"" if typed else f"ctorch\n{tensor.dtype}\n".encode()) + (b"}(" + bits + b"u" if bits else b"")
        )
        function = b"ctorch._utils\n_rebuild_tensor_v2\n" if typed else b"ctorch._utils\n_rebuild_tensor_v3\n"
        made = function + b"(" + storage + layout + rest + b"tR"
        if tensor.parameter:
            made = (
                b"ctorch._utils\n_rebuild_parameter\n"
                + made
                + _is_exact_type(tensor.requires_grad)
                + _ORDERED
                + b"\x87R"
            )
        return made


def _opcode_for(value: Any) -> bool:
    """Whether torch takes a plain value, or a dictionary's key."""
    if isinstance(value, int):
        return value.bit_length() < 8 * _LONGEST_INTEGER
    return type(value) in _SCALARS or (isinstance(value, tuple) and all(map(_opcode_for, value)))


def _sizes(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_is_exact_type, numbers)) + b"t"


def _is_exact_type(value: Any) -> bytes:
    """The operations for a plain value."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return struct.pack(">cd", b"G", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return struct.pack("<cI", b"X", len(data)) + data
    # As Python 2 would have to be told it: protocol 2 has no bytes of its own.
    return b"c_codecs\nencode\n" + _is_exact_type(value.decode("latin1")) + _is_exact_type("latin1") + b"\x86R"


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return struct.pack("<cB", b"K", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = pickle.encode_long(value)
    return struct.pack("<cB", b"\x8a", len(data)) + data
