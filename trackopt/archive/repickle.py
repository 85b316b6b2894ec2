"""A tree of plain values and tensors as a pickle that ``torch.load(weights_only=True)`` takes.

The way back from `trackopt.archive.pickle`, written without torch: operations are put together by hand, and the only
names in it are those of tensors and storages. What has no such form (an object of a class) is left out and told.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from trackopt.archive.nodes import Tensor
from trackopt.archive.rebuild import STORAGES

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS = {dtype: kind for kind, dtype in STORAGES.items() if kind != "Untyped"}
_PLAIN = (type(None), bool, int, float, str)


class Writer:
    """Makes one pickle.

    Args:
        keep: Told a tensor's path, whether it is to be written.

    Attributes:
        left_out: The paths of what was not written.
        storages: Keys of the storages that are needed, each once.
    """

    def __init__(self, keep: Callable[[str], bool]) -> None:
        self.left_out: list[str] = []
        self.storages: dict[str, None] = {}
        self._keep = keep

    def dump(self, tree: Any) -> bytes:
        """The pickle of a tree; what holds nothing any more is an empty container."""
        return b"\x80\x02" + (self._value(tree, ()) or b"N") + b"."

    def _value(self, node: Any, path: tuple[str, ...]) -> bytes | None:
        if isinstance(node, Tensor):
            return self._tensor(node, path)
        if isinstance(node, dict):
            pairs = ((_bare(key), self._value(value, (*path, _name(key)))) for key, value in node.items())
            return b"}(" + b"".join(key + value for key, value in pairs if value is not None) + b"u"
        if isinstance(node, list | tuple):
            items = [self._value(item, (*path, str(index))) or b"N" for index, item in enumerate(node)]
            return (b"](" + b"".join(items) + b"e") if isinstance(node, list) else (b"(" + b"".join(items) + b"t")
        if isinstance(node, _PLAIN):
            return _bare(node)
        if isinstance(node, bytes):
            # As Python 2 would have to be told it: protocol 2 has no bytes of its own.
            return b"c_codecs\nencode\n" + _bare(node.decode("latin1")) + _bare("latin1") + b"\x86R"
        self.left_out.append(".".join(path))
        return None

    def _tensor(self, tensor: Tensor, path: tuple[str, ...]) -> bytes | None:
        name = ".".join(path)
        if not self._keep(name) or tensor.dtype.startswith("q"):
            self.left_out.append(name)
            return None
        self.storages[tensor.storage.key] = None
        typed = tensor.dtype in _KINDS
        kind = f"torch\n{_KINDS[tensor.dtype]}Storage" if typed else "torch.storage\nUntypedStorage"
        count = tensor.storage.nbytes // tensor.itemsize if typed else tensor.storage.nbytes
        place = b"(" + _bare("storage") + f"c{kind}\n".encode() + _bare(tensor.storage.key)
        storage = place + _bare("cpu") + _bare(count) + b"tQ"
        layout = _bare(tensor.offset) + _bare(tensor.shape) + _bare(tensor.stride) + _bare(tensor.requires_grad)
        bits = {name: True for name in ("conj", "neg") if getattr(tensor, name)}
        rest = b"ccollections\nOrderedDict\n)R" + (b"" if typed else f"ctorch\n{tensor.dtype}\n".encode())
        function = b"ctorch._utils\n_rebuild_tensor_v2\n" if typed else b"ctorch._utils\n_rebuild_tensor_v3\n"
        made = function + b"(" + storage + layout + rest + (_bare(bits) if bits else b"") + b"tR"
        if tensor.parameter:
            hooks = b"ccollections\nOrderedDict\n)R"
            made = b"ctorch._utils\n_rebuild_parameter\n" + made + _bare(tensor.requires_grad) + hooks + b"\x87R"
        return made


def _name(key: object) -> str:
    return key if isinstance(key, str) else repr(key)


def _bare(value: object) -> bytes:
    """The operations for a plain value, without the protocol in front and the STOP behind."""
    stream = _Stream()
    pickler = pickle.Pickler(stream, 2)
    pickler.fast = True  # nothing is remembered, so that stretches can be put together
    pickler.dump(value)
    return bytes(stream.data[2:-1])


class _Stream:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)
