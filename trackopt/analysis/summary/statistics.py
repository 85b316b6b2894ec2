"""Measure the values of a checkpoint's tensors: streamed on all cores, each value read once.

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
from trackopt.utils.moments import Moments, merge_moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trackopt.archive import Archive
    from trackopt.archive.decode import Array
    from trackopt.archive.tree import Tensor
    from trackopt.utils.types import JsonObject

_PIECE_BYTES = 16 << 20  # of a thread's task
_BLOCK_ELEMENTS = 1 << 18  # of an array: they fit a cache, and are enough for threads to seldom wait for each other
_ROW_ELEMENTS = 4096  # summed in their own precision; BLAS starts no threads for so few
_MAX_STRIDED_BYTES = 64 << 20  # of a tensor that is not contiguous
_NUMERIC_DTYPES = ("float", "bfloat", "int", "uint", "bool", "complex")
#: Between these, squares of float32 neither overflow nor underflow.
_MIN_SQUARABLE, _MAX_SQUARABLE = 1e-12, 1e12
_MAX_CANCELLATION = 32  # ratio of the sum of squares to m2 above which m2 is computed from deviations


@dataclass(frozen=True, slots=True)
class TensorStatistics(Moments):
    """Moments of a tensor's finite values, and counts of special values. Complex ones count by their magnitude.

    Attributes:
        nan: Number of NaN values.
        inf: Number of infinite values.
        zero: Number of values that are exactly 0.
    """

    nan: int = 0
    inf: int = 0
    zero: int = 0

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``inspect --json --stats``."""
        names = ("norm", "mean", "std", "min", "max", "nan", "inf", "zero")
        return {name: getattr(self, name) for name in names}


def merge(parts: Iterable[TensorStatistics]) -> TensorStatistics:
    """Return the statistics of several tensors as if they were one."""
    parts = list(parts)
    moments = merge_moments(parts)
    return TensorStatistics(
        moments.count,
        moments.mean,
        moments.m2,
        moments.min,
        moments.max,
        nan=sum(part.nan for part in parts),
        inf=sum(part.inf for part in parts),
        zero=sum(part.zero for part in parts),
    )


def measure(archive: Archive, progress: Callable[[int, int], None] | None = None) -> dict[str, TensorStatistics]:
    """Measure every tensor that can be read.

    Skipped are tensors whose values are not in the file, quantized and packed ones, and large ones that are neither
    contiguous nor a permutation of that.

    Args:
        archive: An open archive. Memory stays at some MB per core, however large it is.
        progress: Called with the bytes done and the bytes in all, from time to time, by one thread at a time.

    Returns:
        The statistics by path.
    """
    names_by_view: dict[tuple[Tensor, int], list[str]] = {}
    for name, tensor in archive.tensors():
        if tensor.dtype.startswith(_NUMERIC_DTYPES) and out_of_bounds_reason(tensor, archive.source) is None:
            view = (_in_file_order(tensor), id(tensor.storage.byte_range))
            names_by_view.setdefault(view, []).append(name)
    tasks = [(view, piece) for view in names_by_view for piece in _split(view[0])]
    report = _progress_counter(progress, sum(piece.nbytes for _, piece in tasks))

    def measure_and_report(piece: Tensor) -> TensorStatistics | None:
        part = _measure_piece(archive, piece)
        report(piece.nbytes)
        return part

    parts: dict[tuple[Tensor, int], list[TensorStatistics | None]] = {}
    results = map_threads(measure_and_report, [piece for _, piece in tasks])
    for (view, _), part in zip(tasks, results, strict=True):
        parts.setdefault(view, []).append(part)
    by_name = {}
    for view, of_view in parts.items():
        readable = [part for part in of_view if part is not None]
        if len(readable) == len(of_view):
            by_name.update(dict.fromkeys(names_by_view[view], merge(readable)))
    return {name: by_name[name] for name, _ in archive.tensors() if name in by_name}


def _progress_counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Return a function that adds up the bytes that threads have done, and reports the sum."""
    done, lock = 0, threading.Lock()

    def add(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress(done, total)

    return add


def _in_file_order(tensor: Tensor) -> Tensor:
    """Flatten a tensor in the order of the file if it is contiguous there, as a transposed matrix is."""
    order = sorted(range(len(tensor.shape)), key=lambda axis: tensor.stride[axis], reverse=True)
    permuted = replace(
        tensor, shape=tuple(tensor.shape[axis] for axis in order), stride=tuple(tensor.stride[axis] for axis in order)
    )
    if permuted.is_contiguous:
        return replace(permuted, shape=(tensor.elements,), stride=(1,), is_parameter=False, requires_grad=False)
    return tensor


def _split(tensor: Tensor) -> Iterator[Tensor]:
    if not tensor.is_contiguous or tensor.nbytes <= _PIECE_BYTES:
        yield tensor
        return
    step = _PIECE_BYTES // tensor.itemsize
    for start in range(0, tensor.elements, step):
        yield replace(tensor, shape=(min(step, tensor.elements - start),), offset=tensor.offset + start)


def _measure_piece(archive: Archive, tensor: Tensor) -> TensorStatistics | None:
    if not tensor.is_contiguous and tensor.nbytes > _MAX_STRIDED_BYTES:
        return None
    try:
        return merge(map(_measure_block, archive.chunks(tensor, _BLOCK_ELEMENTS * min(tensor.itemsize, 4))))
    except ArchiveError:
        return None  # `verify` and the findings report the error


def _measure_block(values: Array) -> TensorStatistics:
    """Measure an array that fits a cache."""
    import numpy as np

    with np.errstate(all="ignore"):
        if values.dtype.kind == "c":
            values = np.abs(values)
        elif values.dtype.kind != "f" or values.dtype.itemsize < 4:
            values = values.astype("f4" if values.dtype.itemsize < 4 else "f8")
        if not values.size:
            return TensorStatistics()
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return _measure_finite(values)
        if low == high:
            return TensorStatistics(values.size, low, 0.0, low, high, zero=0 if low else values.size)
        zero = values.size - int(np.count_nonzero(values != 0)) if low <= 0 <= high else 0
        if values.dtype.itemsize == 4 and not _MIN_SQUARABLE < max(-low, high) < _MAX_SQUARABLE:
            values = values.astype("f8")
        mean, m2 = _mean_and_m2(values)
    return TensorStatistics(values.size, mean, m2, low, high, zero=zero)


def _mean_and_m2(values: Array) -> tuple[float, float]:
    import numpy as np

    ones = np.ones(_ROW_ELEMENTS, values.dtype)
    mean, sum_sq = _dot(values, ones) / values.size, _dot(values)
    m2 = sum_sq - values.size * mean * mean
    if sum_sq < _MAX_CANCELLATION * m2:
        return mean, m2
    center = values.dtype.type(mean)
    deviations = values - center
    shift = _dot(deviations, ones) / values.size
    return float(center) + shift, max(0.0, _dot(deviations) - values.size * shift * shift)


def _dot(values: Array, row: Array | None = None) -> float:
    """Return the dot product with a repeated row, or with the values themselves; float64 across rows."""
    import numpy as np

    size = values.size // _ROW_ELEMENTS * _ROW_ELEMENTS
    rows, rest = values[:size].reshape(-1, 1, _ROW_ELEMENTS), values[size:]
    products = np.matmul(rows, rows.reshape(-1, _ROW_ELEMENTS, 1) if row is None else row)
    return float(products.sum(dtype="f8")) + float(np.dot(rest, rest if row is None else row[: rest.size]))


def _measure_finite(values: Array) -> TensorStatistics:
    """Measure the finite values, and count the others."""
    import numpy as np

    nan = int(np.count_nonzero(np.isnan(values)))
    finite = values[np.isfinite(values)]
    return replace(_measure_block(finite), nan=nan, inf=values.size - finite.size - nan)
