"""NumPy arrays and scalars of a pickle, turned into tensors and numbers without NumPy."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.byte_ranges import BytesRange
from trackopt.archive.tree import BYTES, ITEMSIZE, Global, Storage, Tensor, UnknownObject, contiguous_strides

if TYPE_CHECKING:
    from trackopt.archive.io.byte_ranges import ByteRange

KIND = "numpy.ndarray"
_MAX_RANK = 64
_DTYPES = {
    "f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8",
    "u8": "uint64", "u4": "uint32", "u2": "uint16", "u1": "uint8", "b1": "bool", "c8": "complex64",
    "c16": "complex128",
}  # fmt: skip
#: Letters of ``struct`` for the plain numbers that scalars are saved as.
_SCALARS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip


def apply_build(node: UnknownObject) -> Any:
    """Return the array that an object's state describes, or the object itself.

    Arrays of objects, text or records stay as they are.
    """
    state = node.state
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], UnknownObject)):
        return node
    _, shape, dtype, fortran, data = state
    array = _array(dtype, shape, data, fortran is True)
    return node if array is None else array


def reconstruct(kind: Global, *_: Any) -> UnknownObject:
    """Return an empty array, whose state follows."""
    return UnknownObject(kind.name)


def from_buffer(data: Any, dtype: Any, shape: Any, order: str = "C") -> Any:
    """Return the array of ``numpy.core.numeric._frombuffer``, which protocol 5 uses."""
    array = _array(dtype, shape, data, order == "F")
    return UnknownObject(KIND, (data, dtype, shape, order)) if array is None else array


def scalar(dtype: Any, data: Any = b"") -> Any:
    """Return a NumPy scalar as the Python number of the same value."""
    kind, big = _kind(dtype)
    if kind not in _SCALARS or not isinstance(data, bytes) or len(data) != struct.calcsize("=" + _SCALARS[kind]):
        return UnknownObject("numpy.scalar", (dtype, data))
    return struct.unpack((">" if big else "<") + _SCALARS[kind], data)[0]


def as_byte_range(data: Any) -> ByteRange | None:
    """Return the range of a value's bytes; None if it is not made of bytes."""
    if isinstance(data, bytes):
        return BytesRange(data)
    return data.storage.byte_range if isinstance(data, Tensor) and data.kind == BYTES else None


def _kind(dtype: Any) -> tuple[str, bool]:
    """Return the kind and width of a plain dtype, and whether it is big-endian."""
    if not (isinstance(dtype, UnknownObject) and dtype.name == "numpy.dtype" and dtype.args):
        return "", False
    text = str(dtype.args[0])
    state = dtype.state if isinstance(dtype.state, tuple) else ()
    return text.lstrip("<>|="), text.startswith(">") or (len(state) > 1 and state[1] == ">")


def _array(dtype: Any, shape: Any, data: Any, fortran: bool) -> Tensor | None:
    kind, big = _kind(dtype)
    name, byte_range = _DTYPES.get(kind), as_byte_range(data)
    if name is None or byte_range is None or not isinstance(shape, tuple) or len(shape) > _MAX_RANK:
        return None
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        return None
    if math.prod(shape) * ITEMSIZE[name] != byte_range.size:
        return None
    stride = tuple(reversed(contiguous_strides(shape[::-1]))) if fortran else contiguous_strides(shape)
    storage = Storage(byte_range.key, name, "cpu", byte_range.size, byte_range, "big" if big else "little")
    return Tensor(storage, name, shape, stride, kind=KIND)
