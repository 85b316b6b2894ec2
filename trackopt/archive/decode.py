"""Tensor values from the file, as NumPy arrays: in slices, of every dtype, with any strides.

NumPy is imported for the first array, so that reading only a checkpoint's structure does not pay for it. Dtypes that
NumPy lacks are widened: bfloat16 and float8 to float32, complex32 and bcomplex32 to complex64. Quantized and packed
ones are returned as the stored integers.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.source import TensorSource, out_of_bounds_reason, read_storage
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from trackopt.archive.tree import Tensor

    Array = NDArray[Any]

CHUNK_BYTES = 4 << 20
_MAX_EXPANDED_BYTES = 1 << 30
#: Elements whose bytes NumPy can count, whatever their dtype.
MAX_ELEMENTS = 1 << 58
#: NumPy's type codes of the dtypes that it has.
_NUMPY_CODES = {
    "float64": "f8", "float32": "f4", "float16": "f2", "int64": "i8", "int32": "i4",
    "int16": "i2", "int8": "i1",
    "uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "complex64": "c8", "complex128": "c16",
    "qint32": "i4", "qint8": "i1",
}  # fmt: skip
_STRUCT_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B", "bool": "?",
}  # fmt: skip
#: Dtypes whose elements are decoded to the numbers that they mean; quantized ones need their `Quantizer` as well.
NUMERIC_DTYPES = frozenset(
    {*_NUMPY_CODES, "bool", "bfloat16", "bcomplex32", "complex32", "quint8",
     "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}
)  # fmt: skip
#: Exponent bits, mantissa bits, exponent bias, and the patterns that are not finite, of the eight-bit floats.
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7, "nan at the top"),
    "float8_e5m2": (5, 2, 15, "as IEEE"),
    "float8_e4m3fnuz": (4, 3, 8, "nan at -0"),
    "float8_e5m2fnuz": (5, 2, 16, "nan at -0"),
}


def scalar(source: TensorSource, tensor: Tensor) -> float | int | None:
    """Return the value of a tensor with one element, without NumPy; None for a dtype that is no plain number."""
    check(source, tensor)
    code = "H" if tensor.dtype == "bfloat16" else _STRUCT_CODES.get(tensor.dtype)
    if code is None or tensor.elements != 1:
        return None
    start = tensor.offset * tensor.itemsize
    order = "<" if source.byteorder == "little" else ">"
    (value,) = struct.unpack(order + code, read_storage(source, tensor.storage, start, start + tensor.itemsize))
    if tensor.dtype == "bfloat16":
        (value,) = struct.unpack("<f", struct.pack("<I", value << 16))
    result: float | int = -value if tensor.neg else value
    return result


def check(source: TensorSource, tensor: Tensor) -> None:
    """Raise ArchiveError unless the tensor's values are all in its storage."""
    problem = out_of_bounds_reason(tensor, source)
    if problem is None and tensor.nbytes > max(_MAX_EXPANDED_BYTES, tensor.storage.nbytes):
        problem = f"a tensor of {tensor.nbytes:,} bytes is made of {tensor.storage.nbytes:,} stored ones"
    if math.prod(max(1, size) for size in tensor.shape) > MAX_ELEMENTS:
        problem = "its shape is larger than an array can be"  # without elements, if one dimension is 0
    if tensor.is_meta:
        problem = "a tensor on the meta device has no values"
    if problem is not None:
        problem = problem.removeprefix(f"{source.path}: ")
        advice = "" if "; " in problem else "; its values cannot be read, use another checkpoint"
        raise ArchiveError(f"{source.path}: {problem}{advice}")


def raw(source: TensorSource, tensor: Tensor, chunk: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
    """Yield the stored bytes of a tensor's elements, in logical order, in chunks of at most ``chunk`` bytes.

    A contiguous tensor is read chunk by chunk; of any other one the whole extent is read into memory.
    """
    check(source, tensor)
    step = max(1, chunk // tensor.itemsize) * tensor.itemsize
    start = tensor.offset * tensor.itemsize
    if tensor.is_contiguous:
        for position in range(0, tensor.nbytes, step):
            stop = min(position + step, tensor.nbytes)
            yield read_storage(source, tensor.storage, start + position, start + stop)
        return
    data = memoryview(_gather(source, tensor, start).tobytes())
    for position in range(0, tensor.nbytes, step):
        yield data[position : position + step]


def _gather(source: TensorSource, tensor: Tensor, start: int) -> Array:
    import numpy as np

    size = tensor.itemsize
    data = np.frombuffer(read_storage(source, tensor.storage, start, start + tensor.extent * size), f"V{size}")
    strides = [step * size for step in tensor.stride]
    view = np.lib.stride_tricks.as_strided(data, tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).view("u1")


def chunks(source: TensorSource, tensor: Tensor, chunk: int = CHUNK_BYTES) -> Iterator[Array]:
    """Iterate over a tensor's values in logical order, as flat arrays of at most ``chunk`` stored bytes each."""
    for data in raw(source, tensor, chunk):
        yield values(data, tensor, source.byteorder)


def read(source: TensorSource, tensor: Tensor) -> Array:
    """Return a tensor's values as an array of its shape.

    Raises:
        ArchiveError: Its record is shorter than its shape says.
    """
    import numpy as np

    arrays = list(chunks(source, tensor)) or [values(b"", tensor, source.byteorder)]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if array.size != math.prod(tensor.shape):
        raise ArchiveError(
            f"{source.path}: {array.size} values are stored of a tensor of shape {list(tensor.shape)}; it is damaged"
        )
    return array.reshape(tensor.shape)


def values(data: bytes | memoryview, tensor: Tensor, byteorder: str) -> Array:
    """Decode stored bytes of a tensor to a flat array."""
    import numpy as np

    array: Array = _decode(data, tensor.dtype, "<" if byteorder == "little" else ">")
    array = array.conj() if tensor.conj else array
    if tensor.neg:
        np.negative(array, out=(array := array.copy()))
    return array


def _decode(data: bytes | memoryview, dtype: str, order: str) -> Array:
    import numpy as np

    array: Array
    if dtype == "bool":
        array = np.frombuffer(data, "u1") != 0
    elif dtype in ("bfloat16", "bcomplex32"):
        array = np.left_shift(np.frombuffer(data, order + "u2").astype("u4"), 16).view("f4")
        array = array.view("c8") if dtype == "bcomplex32" else array
    elif dtype == "complex32":
        array = np.frombuffer(data, order + "f2").astype("f4").view("c8")
    elif dtype in _FLOAT8 or dtype == "float8_e8m0fnu":
        array = _float8(dtype)[np.frombuffer(data, "u1")]
    elif dtype in _NUMPY_CODES:
        array = np.frombuffer(data, order + _NUMPY_CODES[dtype])
        array = array if order == "<" else array.astype(_NUMPY_CODES[dtype])
    else:
        array = np.frombuffer(data, order + "u2" if dtype == "bits16" else "u1")
    return array


@cache
def _float8(dtype: str) -> Array:
    """Return the 256 values of an eight-bit float, after the OCP and the fnuz definitions."""
    import numpy as np

    codes = np.arange(256)
    if dtype == "float8_e8m0fnu":
        return _with_nan(np.exp2(codes - 127.0), codes == 255)
    exponent_bits, mantissa_bits, bias, special = _FLOAT8[dtype]
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    size = np.where(exponent > 0, (1 + fraction) * np.exp2(exponent - bias), fraction * np.exp2(1.0 - bias))
    if special == "as IEEE":
        top = exponent == (1 << exponent_bits) - 1
        size = np.where(top & (fraction == 0), np.inf, size)
        missing = top & (fraction > 0)
    else:
        missing = codes & 0x7F == 0x7F if special == "nan at the top" else codes == 0x80
    return _with_nan(np.where(codes < 128, size, -size), missing)


def _with_nan(table: Array, missing: Array) -> Array:
    import numpy as np

    result: np.ndarray[Any, Any] = np.where(missing, np.nan, table).astype("f4")
    return result
