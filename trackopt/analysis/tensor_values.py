"""The numbers that the elements of a tensor mean, block by block: 16-bit floats widened, quantized ones by value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trackopt.archive import decode
from trackopt.archive.tree import Tensor
from trackopt.utils.kernels import kernels

if TYPE_CHECKING:
    from collections.abc import Hashable

    from trackopt.archive.decode import Array
    from trackopt.archive.io.source import TensorSource

_QUANTIZED_DTYPES = ("qint8", "quint8", "qint32")
_HALF_DTYPES = ("float16", "bfloat16")


def not_numeric_reason(tensor: Tensor) -> str:
    """Return why the elements of a tensor are no numbers to calculate with; empty if they are."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.dtype not in decode.NUMERIC_DTYPES:
        return f"the values of {tensor.dtype} are packed"
    if tensor.dtype in _QUANTIZED_DTYPES and tensor.quantizer is None:
        return "the scale of its quantized values is unknown"
    return ""


def has_channels(tensor: Tensor) -> bool:
    """Return True if the channels of a quantized tensor have scales of their own."""
    return tensor.quantizer is not None and tensor.quantizer.axis is not None


class ValueDecoder:
    """Decodes stored elements of a tensor, or of parts of it, to numbers.

    Args:
        source: The tensor's container, from which the scales of its channels are read.
        tensor: The tensor.

    Raises:
        ArchiveError: The scales cannot be read.
    """

    def __init__(self, source: TensorSource, tensor: Tensor) -> None:
        self._tensor = tensor
        self._byteorder = source.byteorder
        self._is_half = tensor.dtype in _HALF_DTYPES and source.byteorder == "little" and not tensor.neg
        quantizer = tensor.quantizer
        self._axis = None if quantizer is None else quantizer.axis
        self._scale: Any = None
        if quantizer is not None:
            self._scale = _read_parameter(source, quantizer.scale)
            self._zero_point = _read_parameter(source, quantizer.zero_point)

    @property
    def quantization(self) -> tuple[Hashable, ...]:
        """What determines the values of its integers; empty if it is not quantized. Equal ones are equal mappings."""
        if self._scale is None:
            return ()
        parameters = (self._scale, self._zero_point)
        return (self._axis, *(each if isinstance(each, int | float) else each.tobytes() for each in parameters))

    def decode(self, data: bytes | memoryview, first: int = 0) -> Array:
        """Return the numbers as a flat, aligned array.

        Args:
            data: Stored elements, in logical order.
            first: The logical index of the first one; it matters only if channels have scales of their own.
        """
        import numpy as np

        if self._is_half:
            return kernels().widen(_align(np.frombuffer(data, "u2")), self._tensor.dtype)
        values = decode.values(data, self._tensor, self._byteorder)
        if self._scale is None:
            return _align(values)
        scale, zero_point = self._scale, self._zero_point
        if self._axis is not None:
            channels = self._channels(self._axis, first, values.size)
            scale, zero_point = scale[channels], zero_point[channels]
        numbers: Array = (values.astype("f8") - zero_point) * scale
        return numbers

    def _channels(self, axis: int, first: int, count: int) -> Array:
        """Return the channel of each of ``count`` elements in logical order."""
        import numpy as np

        shape = self._tensor.shape
        channels: Array = np.arange(first, first + count) // math.prod(shape[axis + 1 :]) % shape[axis]
        return channels


def _align(array: Array) -> Array:
    """Return an array as kernels take it; some formats do not align their tensors."""
    return array if array.flags.aligned else array.copy()


def _read_parameter(source: TensorSource, value: float | Tensor) -> Any:
    """Return a scale or a zero point: a number, or an array with one for each channel."""
    return decode.read(source, value).astype("f8") if isinstance(value, Tensor) else value
