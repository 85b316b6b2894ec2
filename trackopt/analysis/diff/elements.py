"""Compare single elements of tensors: bits, units in the last place, values after a cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trackopt.archive.decode import Array

#: Bits per real number of the dtypes whose bits, without the sign, grow with the value.
_FLOAT_BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "complex128": 64, "complex64": 32, "complex32": 16, "bcomplex32": 16,
}  # fmt: skip
#: From most to least precise.
_PRECISION = ("float64", "float32", "float16", "bfloat16")
_FEW = 16  # share of the elements, as its reciprocal, that are selected faster than all are converted
_ORDERS = {"little": "<", "big": ">"}
Bytes = bytes | memoryview


def find_differing(x: Bytes, y: Bytes, itemsize: int) -> Array:
    """Return a mask of the elements that differ in any bit."""
    import numpy as np

    word = min(itemsize, 8)
    different: Array = np.frombuffer(x, f"u{word}") != np.frombuffer(y, f"u{word}")
    return different if word == itemsize else np.asarray(different.reshape(-1, itemsize // word).any(axis=1))


def max_ulp_distance(x: Bytes, y: Bytes, dtype: str, byteorder: str) -> int | None:
    """Return the largest distance of two elements in units in the last place; None for other dtypes than floats.

    -0 and 0 have no distance. NaN counts as further away than infinity.

    Example:
        >>> import numpy as np
        >>> max_ulp_distance(np.float32([1, -1]).tobytes(), np.float32([1 + 2**-23, -1]).tobytes(), "float32", "little")
        1
    """
    import numpy as np

    if dtype not in _FLOAT_BITS:
        return None
    width = _FLOAT_BITS[dtype]
    kind = f"{_ORDERS[byteorder]}i{width // 8}"
    a, b = (np.frombuffer(data, kind).astype(kind[1:], copy=False) for data in (x, y))
    if not a.size:
        return 0
    flipped, distance = (a ^ b) < 0, 0
    count = np.count_nonzero(flipped)
    if count > a.size // _FEW:
        return _max_ordered_distance(a, b, width)
    difference = a - b  # of integers of the same sign, which does not overflow
    if count:
        distance = _max_ordered_distance(a[flipped], b[flipped], width)
        difference[flipped] = 0
    return max(distance, int(difference.max()), -int(difference.min()))


def _max_ordered_distance(a: Array, b: Array, width: int) -> int:
    """Return the largest distance of the bits of floats of any sign."""
    import numpy as np

    a, b = (_to_ordered_integers(bits, width) for bits in (a, b))
    distance = np.maximum(a, b).view(f"u{width // 8}")
    distance -= np.minimum(a, b).view(f"u{width // 8}")
    return int(distance.max())


def _to_ordered_integers(bits: Array, width: int) -> Array:
    """Map the bits of floats to integers of the same order: those of negative floats to their negated magnitude."""
    import numpy as np

    kind = np.dtype(f"i{width // 8}").type
    sign = bits.astype(kind, copy=False) >> kind(width - 1)
    ordered: Array = (sign & kind((1 << (width - 1)) - 1)) ^ bits
    ordered -= sign
    return ordered


def narrower(a: str, b: str) -> str | None:
    """Return the less precise of two floating dtypes; None if one of them is another dtype.

    Example:
        >>> narrower("float32", "bfloat16"), narrower("int8", "float32")
        ('bfloat16', None)
    """
    return max(a, b, key=_PRECISION.index) if {a, b} <= {*_PRECISION} else None


def cast_to(values: Array, dtype: str) -> Array:
    """Cast floats as torch's ``.to(dtype)`` does: to the nearest number, ties to even.

    Args:
        values: An array of float64, float32 or float16.
        dtype: One of these, or ``"bfloat16"``, which is returned as float32.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            return values.astype(dtype)
        bits = values.astype("f4").view("u4")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view("f4")
        result: Array = np.where(np.isnan(values), np.float32(np.nan), rounded)
        return result


def equal_values(x: Array, y: Array) -> Array:
    """Return a mask of the elements that are the same number, or both NaN."""
    same: Array = (x == y) | ((x != x) & (y != y))
    return same


def count_differing_after_cast(x: Array, y: Array, dtypes: tuple[str, str]) -> int | None:
    """Count the elements that differ after a cast to the less precise dtype; None if neither is less precise."""
    import numpy as np

    dtype = narrower(*dtypes)
    if dtype is None:
        return None
    return int(np.count_nonzero(~equal_values(cast_to(x, dtype), cast_to(y, dtype))))
