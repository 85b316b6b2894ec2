"""Single elements of tensors: which differ, by how many units in the last place, and what a cast makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trackopt.archive.decode import Array

#: Bits of an element of every dtype whose bits, but for the sign, grow with its value.
_FLOATS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "complex128": 64, "complex64": 32, "complex32": 16,
}  # fmt: skip
#: From most to least: what is cast to what, where two dtypes differ.
_PRECISION = ("float64", "float32", "float16", "bfloat16")
_ORDERS = {"little": "<", "big": ">"}
Bytes = bytes | memoryview


def differing(x: Bytes, y: Bytes, itemsize: int) -> Array:
    """Which elements differ in a bit."""
    import numpy as np

    word = min(itemsize, 8)
    different: Array = np.frombuffer(x, f"u{word}") != np.frombuffer(y, f"u{word}")
    return different if word == itemsize else np.asarray(different.reshape(-1, itemsize // word).any(axis=1))


def ulps(x: Bytes, y: Bytes, dtype: str, byteorder: str) -> int | None:
    """The largest distance of two elements, counted in numbers of their dtype; None for what is no float.

    -0 and 0 are the same number. Elements that are not a number count as far away.

    Example:
        >>> import numpy as np
        >>> ulps(np.float32([1, -1]).tobytes(), np.float32([1 + 2**-23, -1]).tobytes(), "float32", "little")
        1
    """
    import numpy as np

    if dtype not in _FLOATS:
        return None
    width = _FLOATS[dtype]
    kind = f"{_ORDERS[byteorder]}i{width // 8}"
    a, b = (_ordered(np.frombuffer(data, kind), width) for data in (x, y))
    distance = np.maximum(a, b).view(f"u{width // 8}")
    distance -= np.minimum(a, b).view(f"u{width // 8}")
    return int(distance.max(initial=0))


def _ordered(bits: Array, width: int) -> Array:
    """Integers in the order of the numbers that they are the bits of: of negative ones the magnitude, negated."""
    import numpy as np

    kind = np.dtype(f"i{width // 8}").type
    sign = bits.astype(kind, copy=False) >> kind(width - 1)
    ordered: Array = (sign & kind((1 << (width - 1)) - 1)) ^ bits
    ordered -= sign
    return ordered


def narrower(a: str, b: str) -> str | None:
    """Which of two dtypes the other one loses precision to; None where that cannot be said.

    Example:
        >>> narrower("float32", "bfloat16"), narrower("int8", "float32")
        ('bfloat16', None)
    """
    return max(a, b, key=_PRECISION.index) if {a, b} <= {*_PRECISION} else None


def cast(values: Array, dtype: str) -> Array:
    """What torch's ``.to(dtype)`` makes of floats: the nearest number, of two the even one.

    Args:
        values: Of float64, float32 or float16.
        dtype: One of those, or ``"bfloat16"``, which is given as float32.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            return values.astype(dtype)
        bits = values.astype("f4").view("u4")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view("f4")
        result: Array = np.where(np.isnan(values), np.float32(np.nan), rounded)
        return result


def same_values(x: Array, y: Array) -> Array:
    """Which elements are the same number, or both none."""
    same: Array = (x == y) | ((x != x) & (y != y))
    return same


def uncast(x: Array, y: Array, dtypes: tuple[str, str]) -> int | None:
    """How many elements differ after the more precise ones are cast to the other dtype; None where none is."""
    import numpy as np

    to = narrower(*dtypes)
    if to is None:
        return None
    return int(np.count_nonzero(~same_values(cast(x, to), cast(y, to))))
