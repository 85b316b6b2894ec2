"""Norm, mean, spread and odd values of tensors: streamed on all cores, each value read once.

NumPy is imported when the first tensor is measured, and only then.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trackopt.archive.io.parallel import map_threads
from trackopt.archive.io.source import out_of_bounds_reason
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trackopt.archive import Archive
    from trackopt.archive.decode import Array
    from trackopt.archive.tree import Tensor

_PIECE = 16 << 20  # what one thread takes at a time
_BLOCK = 1 << 18  # values that it holds at a time: few enough for a cache, and so many that threads seldom meet
_ROW = 4096  # values that are summed in their own precision; BLAS takes so few in the thread that asks
_GATHERED = 64 << 20
_MEASURED = ("float", "bfloat", "int", "uint", "bool", "complex")
#: Between these, squares of float32 neither overflow nor vanish.
_SMALL, _LARGE = 1e-12, 1e12
_CANCELLED = 32  # how many times the spread the sum of squares may be before the spread is taken from the mean


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a tensor's values are like. Complex ones count by their magnitude.

    ``norm`` to ``max`` are those of the finite values, and NaN where there is none.

    Attributes:
        count: Finite values.
        mean: Their average.
        m2: The sum of their squared distances from it.
        min: The smallest of them.
        max: The largest of them.
        nan: How many values are not a number.
        inf: How many are infinite.
        zero: How many are exactly 0.
    """

    count: int = 0
    mean: float = math.nan
    m2: float = 0.0
    min: float = math.nan
    max: float = math.nan
    nan: int = 0
    inf: int = 0
    zero: int = 0

    @property
    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.m2 + self.count * self.mean**2) if self.count else math.nan

    @property
    def std(self) -> float:
        """The standard deviation, of the values as a whole population."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan

    def as_dict(self) -> dict[str, float]:
        """The facts under the keys of ``inspect --json --stats``."""
        names = ("norm", "mean", "std", "min", "max", "nan", "inf", "zero")
        return {name: getattr(self, name) for name in names}

    def merge(self, other: Statistics) -> Statistics:
        """Those of both together, after Chan, Golub and LeVeque (1979)."""
        odd = (self.nan + other.nan, self.inf + other.inf, self.zero + other.zero)
        if not self.count or not other.count:
            full = self if self.count else other
            return Statistics(full.count, full.mean, full.m2, full.min, full.max, *odd)
        count, distance = self.count + other.count, other.mean - self.mean
        mean = self.mean + distance * other.count / count
        spread = self.m2 + other.m2 + distance**2 * self.count * other.count / count
        return Statistics(count, mean, spread, min(self.min, other.min), max(self.max, other.max), *odd)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of several tensors as if they were one."""
    result = Statistics()
    for part in parts:
        result = result.merge(part)
    return result


def measure(archive: Archive, progress: Callable[[int, int], None] | None = None) -> dict[str, Statistics]:
    """The statistics of every tensor that can be read, by its path.

    Args:
        archive: An open archive. Memory stays at some MB for each core, however large it is.
        progress: Told the bytes that are done and the bytes in all, from time to time, by one thread at a time.

    Left out are tensors whose values are not in the file, quantized and packed ones, and large ones that are
    neither contiguous nor a permutation of that.
    """
    alike: dict[tuple[Tensor, int], list[str]] = {}
    for name, tensor in archive.tensors():
        if tensor.dtype.startswith(_MEASURED) and out_of_bounds_reason(tensor, archive.source) is None:
            alike.setdefault((_flat(tensor), id(tensor.storage.byte_range)), []).append(name)
    pieces = [(key, piece) for key in alike for piece in _pieces(key[0])]
    tell = _counted(progress, sum(piece.nbytes for _, piece in pieces))

    def measured(piece: Tensor) -> Statistics | None:
        part = _measured(archive, piece)
        tell(piece.nbytes)
        return part

    found: dict[tuple[Tensor, int], Statistics | None] = {}
    for (key, _), part in zip(pieces, map_threads(measured, [piece for _, piece in pieces]), strict=True):
        before = found.get(key, Statistics())
        found[key] = before.merge(part) if before is not None and part is not None else None
    told = {name: part for key, part in found.items() if part is not None for name in alike[key]}
    return {name: told[name] for name, _ in archive.tensors() if name in told}


def _counted(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Adds up what the threads have done, and tells it."""
    done, lock = 0, threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress(done, total)

    return count


def _flat(tensor: Tensor) -> Tensor:
    """The same values in the order of the file, where that can be: a transposed matrix is read as it lies."""
    order = sorted(range(len(tensor.shape)), key=lambda axis: tensor.stride[axis], reverse=True)
    lying = replace(tensor, shape=tuple(tensor.shape[a] for a in order), stride=tuple(tensor.stride[a] for a in order))
    if lying.is_contiguous:
        return replace(lying, shape=(tensor.elements,), stride=(1,), is_parameter=False, requires_grad=False)
    return tensor


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    if not tensor.is_contiguous or tensor.nbytes <= _PIECE:
        yield tensor
        return
    step = _PIECE // tensor.itemsize
    for start in range(0, tensor.elements, step):
        yield replace(tensor, shape=(min(step, tensor.elements - start),), offset=tensor.offset + start)


def _measured(archive: Archive, tensor: Tensor) -> Statistics | None:
    if not tensor.is_contiguous and tensor.nbytes > _GATHERED:
        return None
    try:
        return merge(map(_block, archive.chunks(tensor, _BLOCK * min(tensor.itemsize, 4))))
    except ArchiveError:
        return None  # `verify`, and the findings, say why


def _block(values: Array) -> Statistics:
    """The statistics of an array that fits a cache."""
    import numpy as np

    with np.errstate(all="ignore"):
        if values.dtype.kind == "c":
            values = np.abs(values)
        elif values.dtype.kind != "f" or values.dtype.itemsize < 4:
            values = values.astype("f4" if values.dtype.itemsize < 4 else "f8")
        if not values.size:
            return Statistics()
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return _nonfinite_block(values)
        if low == high:
            return Statistics(values.size, low, 0.0, low, high, zero=0 if low else values.size)
        zero = values.size - int(np.count_nonzero(values != 0)) if low <= 0 <= high else 0
        if values.dtype.itemsize == 4 and not _SMALL < max(-low, high) < _LARGE:
            values = values.astype("f8")
        mean, spread = _moments(values)
    return Statistics(values.size, mean, spread, low, high, zero=zero)


def _moments(values: Array) -> tuple[float, float]:
    """The mean, and the sum of squared distances from it."""
    import numpy as np

    one = np.ones(_ROW, values.dtype)
    mean, squares = _dot(values, one) / values.size, _dot(values)
    spread = squares - values.size * mean**2
    if squares < _CANCELLED * spread:
        return mean, spread
    middle = values.dtype.type(mean)
    away = values - middle
    shift = _dot(away, one) / values.size
    return float(middle) + shift, max(0.0, _dot(away) - values.size * shift**2)


def _dot(values: Array, row: Array | None = None) -> float:
    """The sum of all values times those of a row that is repeated, or of their squares; float64 across rows."""
    import numpy as np

    whole = values.size // _ROW * _ROW
    rows, rest = values[:whole].reshape(-1, 1, _ROW), values[whole:]
    products = np.matmul(rows, rows.reshape(-1, _ROW, 1) if row is None else row)
    return float(products.sum(dtype="f8")) + float(np.dot(rest, rest if row is None else row[: rest.size]))


def _nonfinite_block(values: Array) -> Statistics:
    import numpy as np

    nan = int(np.count_nonzero(np.isnan(values)))
    finite = values[np.isfinite(values)]
    part = _block(finite)
    return replace(part, nan=nan, inf=values.size - finite.size - nan)
