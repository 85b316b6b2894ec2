"""Sums, extremes, inner products and distances of NumPy arrays, added in float64, and the widening of 16-bit floats.

NumKong's kernels do it at the speed of memory. Where it has no wheel, or computes something else than NumPy does, NumPy
is used, which takes several times as long. Both are imported when `kernels` is called first.
"""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

FLOATS, SMALL_INTEGERS = "fd", "bB"  # NumKong 7.8 adds the squares of int16 wrongly
#: NumPy's characters of the dtypes that kernels take. A dtype's name takes as long as a kernel.
KERNEL_DTYPES = FLOATS + SMALL_INTEGERS
_MIN_PARALLEL = 1 << 12  # elements, which take as long as a call by way of ctypes
_LIBRARY_VERSION = "7"  # the major version, within which the C interface stays


class Sums(NamedTuple):
    """Sums over the elements of an array, and the extremes.

    If an element is NaN or infinite, so is ``sum``, and the others mean nothing.
    """

    sum: float
    sum_sq: float
    min: float
    max: float


class Kernels(Protocol):
    """Reductions of flat, aligned arrays of at least one element, of float32 or float64.

    `sums` takes integers of 8 bits, too.
    """

    def sums(self, x: Array) -> Sums:
        """Return the sums over all elements, and the extremes."""

    def sum_sq(self, x: Array) -> float:
        """Return the sum of squares."""

    def dot(self, x: Array, y: Array) -> float:
        """Return the inner product of two arrays of the same dtype and size."""

    def squared_distance(self, x: Array, y: Array) -> float:
        """Return the sum of the squared differences of two arrays of the same dtype and size."""

    def widen(self, bits: Array, dtype: str) -> Array:
        """Convert the bits of float16 or bfloat16 numbers, an array of uint16, to float32."""


class NumPyKernels:
    """Kernels by NumPy, which widens arrays to float64 first."""

    def sums(self, x: Array) -> Sums:
        """See `Kernels`."""
        import numpy as np

        with np.errstate(all="ignore"):
            wide = x.astype("f8")
            return Sums(float(wide.sum()), _dot(wide, wide), float(x.min()), float(x.max()))

    def sum_sq(self, x: Array) -> float:
        """See `Kernels`."""
        return self.dot(x, x)

    def dot(self, x: Array, y: Array) -> float:
        """See `Kernels`."""
        return _dot(x.astype("f8"), y.astype("f8"))

    def squared_distance(self, x: Array, y: Array) -> float:
        """See `Kernels`."""
        import numpy as np

        with np.errstate(all="ignore"):
            difference = x.astype("f8") - y
            return _dot(difference, difference)

    def widen(self, bits: Array, dtype: str) -> Array:
        """See `Kernels`."""
        import numpy as np

        if dtype == "float16":
            return bits.view("f2").astype("f4")
        wide: Array = np.left_shift(bits.astype("u4"), 16).view("f4")
        return wide


def _dot(x: Array, y: Array) -> float:
    import numpy as np

    with np.errstate(all="ignore"):
        # einsum and not dot: BLAS would start threads of its own in each of ours.
        return float(np.einsum("i,i->", x, y))


class NumKongKernels:
    """Kernels by NumKong.

    Args:
        numkong: The module.
    """

    def __init__(self, numkong: Any) -> None:
        self._numkong = numkong

    def sums(self, x: Array) -> Sums:
        """See `Kernels`."""
        low, _, high, _ = self._numkong.minmax(x) or (math.nan, 0, math.nan, 0)
        total, sum_sq = self._numkong.moments(x)
        return Sums(float(total), float(sum_sq), float(low), float(high))

    def sum_sq(self, x: Array) -> float:
        """See `Kernels`."""
        return float(self._numkong.moments(x)[1])

    def dot(self, x: Array, y: Array) -> float:
        """See `Kernels`."""
        return float(self._numkong.dot(x, y))

    def squared_distance(self, x: Array, y: Array) -> float:
        """See `Kernels`."""
        return float(self._numkong.sqeuclidean(x, y))

    def widen(self, bits: Array, dtype: str) -> Array:
        """See `Kernels`."""
        import numpy as np

        wide = np.empty(bits.size, "f4")
        view = bits.view("f2") if dtype == "float16" else self._view(bits)
        self._numkong.astype(view, "float32", out=wide)
        return wide

    def _view(self, bits: Array) -> Any:
        return self._numkong.from_pointer(bits.__array_interface__["data"][0], bits.size, "bfloat16")


class _Results(threading.local):
    """Memory for what functions of the library return, and its addresses; each thread has its own."""

    def __init__(self) -> None:
        self.sums = ctypes.c_double(), ctypes.c_double()
        indices = ctypes.c_size_t(), ctypes.c_size_t()
        self.extremes = {char: (kind(), kind()) for char, kind in (("f", ctypes.c_float), ("d", ctypes.c_double))}
        self.sum_addresses = [ctypes.addressof(each) for each in self.sums]
        self.extreme_addresses = {
            char: [ctypes.addressof(each) for pair in zip(extremes, indices, strict=True) for each in pair]
            for char, extremes in self.extremes.items()
        }
        self._indices = indices


class NumKongLibrary(NumKongKernels):
    """Kernels by NumKong, with the sums of floats by its C interface, since the Python one does not release the GIL.

    Args:
        numkong: The module, whose file is the library.

    Raises:
        ImportError: Its C interface may be another one.
    """

    def __init__(self, numkong: Any) -> None:
        super().__init__(numkong)
        if numkong.__version__.partition(".")[0] != _LIBRARY_VERSION:
            raise ImportError(f"the C interface of NumKong {numkong.__version__} is not known")
        library = ctypes.CDLL(numkong._numkong.__file__)
        value, size = ctypes.c_void_p, ctypes.c_size_t
        for name in ("f32", "f64"):
            getattr(library, f"nk_reduce_minmax_{name}").argtypes = [value, size, size, *[value] * 4]
            getattr(library, f"nk_reduce_moments_{name}").argtypes = [value, size, size, *[value] * 2]
        self._functions: dict[str, tuple[Any, Any]] = {
            "f": (library.nk_reduce_minmax_f32, library.nk_reduce_moments_f32),
            "d": (library.nk_reduce_minmax_f64, library.nk_reduce_moments_f64),
        }
        self._results = _Results()

    def sum_sq(self, x: Array) -> float:
        """See `Kernels`."""
        if x.size < _MIN_PARALLEL:
            return super().sum_sq(x)
        self._functions[x.dtype.char][1](*_address(x), *self._results.sum_addresses)
        return float(self._results.sums[1].value)

    def sums(self, x: Array) -> Sums:
        """See `Kernels`."""
        char = x.dtype.char
        if x.size < _MIN_PARALLEL or char not in self._functions:
            return super().sums(x)
        minmax, moments = self._functions[char]
        where = _address(x)
        results = self._results
        low, high = results.extremes[char]
        total, sum_sq = results.sums
        minmax(*where, *results.extreme_addresses[char])
        moments(*where, *results.sum_addresses)
        return Sums(total.value, sum_sq.value, low.value, high.value)


def _address(x: Array) -> tuple[int, int, int]:
    """Return where an array is, how many elements it has, and how many bytes are from one to the next."""
    return x.__array_interface__["data"][0], x.size, x.itemsize


def agree(ours: Kernels, reference: Kernels) -> bool:
    """Return True if two implementations compute the same of some arrays: exactly, or to 12 digits where they add."""
    import numpy as np

    bits = np.arange(0, 1 << 16, 7, dtype="u2")
    for name in ("float16", "bfloat16"):
        if not np.array_equal(ours.widen(bits, name), reference.widen(bits, name), equal_nan=True):
            return False
    for x in _samples():
        pair: list[Sequence[float]] = [ours.sums(x), reference.sums(x)]
        if not math.isfinite(pair[1][0]):
            if math.isfinite(pair[0][0]):
                return False
            continue
        if x.dtype.kind == "f":
            y = np.ascontiguousarray(x[::-1])
            pair = [[*sums, k.sum_sq(x), k.dot(x, y), k.squared_distance(x, y)]
                    for sums, k in zip(pair, (ours, reference), strict=True)]  # fmt: skip
        if not all(map(_is_same, *pair)):
            return False
    return True


def _samples() -> Iterator[Array]:
    import numpy as np

    noise = np.sin(np.arange(5003.0) ** 2) * 2 + 3  # as good as random numbers, whose module takes 10 ms to import
    for dtype in FLOATS:
        x = noise.astype(dtype)
        yield from (x, x * x.dtype.type(1e-20), np.full(1001, 0.1, dtype), x[:1])
        yield x[:9] * x.dtype.type(1e-40)  # subnormal in float32
        strange = np.array([1.0, math.inf, -2.0, math.nan, -math.inf, 3.0], dtype)
        yield from (strange[:stop] for stop in range(1, 7))
        yield strange[3:4]
    for dtype in SMALL_INTEGERS:
        limits = np.iinfo(dtype)
        yield from (np.full(1 << 12, extreme, dtype) for extreme in (limits.min, limits.max))
        yield (noise * 7).astype(dtype)


def _is_same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b) or math.isclose(a, b, rel_tol=1e-12)


@cache
def kernels() -> Kernels:
    """Return the fastest kernels of this machine that are right."""
    reference = NumPyKernels()
    for make in (NumKongLibrary, NumKongKernels):
        try:
            import numkong

            if agree(ours := make(numkong), reference):
                return ours
        except Exception:  # noqa: BLE001, S112 - no wheel, or another interface
            continue
    return reference
