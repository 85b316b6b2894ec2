"""What the calls in a checkpoint's pickle stand for.

Each entry of the table turns a name and its arguments into a plain value or a node. Whatever is not in it
is described as an `Opaque` node. Nothing here imports or calls what the file names.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.bounds import Broken, checked_key
from trackopt.archive.nodes import ITEMSIZE, Global, Opaque, Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_RANK = 64
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64",
    "QInt32": "qint32", "QInt8": "qint8", "QUInt8": "quint8", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
    "Untyped": "uint8",
}  # fmt: skip
#: Letters of ``struct`` for the plain numbers that NumPy scalars are saved as.
_SCALARS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip


def call(name: str, args: tuple[Any, ...]) -> Any:
    """What stands for the result of calling ``name`` with ``args``.

    Raises:
        Broken: The arguments of a known name make no sense.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        return Opaque(name, args)
    try:
        return builder(*args)
    except (TypeError, ValueError, LookupError, AttributeError, struct.error) as error:
        raise Broken(f"{name} has arguments that make no sense") from error


def storage(key: Any) -> Any:
    """The storage that a persistent id names, or what is known of it."""
    if not (isinstance(key, tuple) and len(key) >= 5 and _string(key[0]) == "storage" and isinstance(key[1], Global)):
        return Opaque("persistent id", (key,))
    kind, _, suffix = key[1].name.rpartition(".")[2].partition("Storage")
    dtype = STORAGES.get(kind)
    if dtype is None or suffix:
        raise Broken(f"{key[1].name} is not a kind of storage that torch has")
    if not _is_size(key[4]):
        raise Broken(f"storage {key[2]!r} has a size that makes no sense")
    return Storage(_string(key[2]), dtype, _string(key[3]), key[4] * ITEMSIZE[dtype])


def _string(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(base: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    """``_rebuild_tensor`` and ``_v2``: ``rest`` is requires_grad, hooks, and the conj and neg bits."""
    if not isinstance(base, Storage):
        return Opaque("torch.Tensor", (base, offset, shape, stride, *rest))
    bits = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    return _checked(base, base.dtype, (offset, shape, stride), bool(rest and rest[0]), bits)


def _tensor_v3(base: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    """``_rebuild_tensor_v3``: the dtype stands behind the hooks, since the storage is untyped."""
    if not isinstance(base, Storage):
        return Opaque("torch.Tensor", (base, offset, shape, stride, *rest))
    dtype = rest[2].name.removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise Broken(f"the dtype {dtype} is not known")
    bits = rest[3] if len(rest) > 3 and isinstance(rest[3], dict) else {}
    return _checked(base, dtype, (offset, shape, stride), bool(rest[0]), bits)


def _checked(
    base: Storage, dtype: str, layout: tuple[Any, Any, Any], requires_grad: bool, bits: dict[Any, Any]
) -> Tensor:
    offset, shape, stride = layout
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or len(shape) > _MAX_RANK or not all(map(_is_size, (*shape, *stride, offset))):
        raise Broken(f"a tensor in storage {base.key!r} has a shape, strides or an offset that make no sense")
    conj, neg = bits.get("conj") is True, bits.get("neg") is True
    return Tensor(base, dtype, shape, stride, offset, requires_grad=requires_grad, conj=conj, neg=neg)


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> Any:
    if isinstance(data, Tensor):
        return replace(data, parameter=True, requires_grad=bool(requires_grad))
    return data


def _from_type(function: Global, _: Any, args: tuple[Any, ...], *__: Any) -> Any:
    """A subclass of Tensor: what it holds is the plain tensor that it was made from."""
    if function.name not in _TENSORS:
        return Opaque(function.name, args)
    return call(function.name, args)


def _mapping(*args: Any) -> Any:
    source = args[-1] if args else ()
    pairs = source.items() if isinstance(source, dict) else source
    return {checked_key(key): value for key, value in pairs}


def _default_mapping(*args: Any) -> Any:
    return _mapping(*args[1:])


def _size(sizes: Any = ()) -> Any:
    return tuple(sizes)


def _device(kind: Any, index: Any = None) -> Any:
    return f"{_string(kind)}:{index}" if index is not None else _string(kind)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Broken("bytes are given in an encoding that no pickle uses")
    return text.encode(encoding)


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes:
    if isinstance(data, str):
        return _encode(data, encoding)
    if not isinstance(data, bytes):
        raise Broken("bytes are made of something else")
    return data


def _complex(real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _scalar(dtype: Opaque, data: bytes = b"") -> Any:
    """A NumPy scalar as the Python number of the same value."""
    kind = dtype.args[0] if isinstance(dtype, Opaque) and dtype.args else None
    if kind not in _SCALARS or len(data) != struct.calcsize("=" + _SCALARS[kind]):
        return Opaque("numpy.scalar", (dtype, data))
    big = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
    return struct.unpack((">" if big else "<") + _SCALARS[kind], data)[0]


def _set(kind: str) -> Callable[..., Any]:
    return lambda items=(): Opaque(kind, items=list(items))


def _deque(items: Any = (), *_: Any) -> Any:
    return list(items)


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_BUILDERS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _default_mapping,
    "collections.deque": _deque,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    **{
        f"{module}.{name}": builder
        for module in ("builtins", "__builtin__")
        for name, builder in {
            "set": _set("builtins.set"),
            "frozenset": _set("builtins.frozenset"),
            "complex": _complex,
            "dict": _mapping,
            "bytes": _bytes,
            "bytearray": _bytes,
        }.items()
    },
}
