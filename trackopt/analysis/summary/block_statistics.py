"""Statistics of a tensor's values: of one block that fits a cache, and of several parts together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trackopt.utils.kernels import KERNEL_DTYPES, kernels
from trackopt.utils.moments import Moments, merge_moments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trackopt.archive.decode import Array
    from trackopt.utils.types import JsonObject

#: The `TensorStatistics.unit` of complex numbers, and of complex and real ones together.
MAGNITUDE, MIXED_UNIT = "|z|", "x, |z|"
_MAX_CANCELLATION = 1e4  # ratio of the sum of squares to m2 above which m2 is computed from deviations


@dataclass(frozen=True, slots=True)
class TensorStatistics(Moments):
    """Moments of a tensor's finite values, and counts of special values; ``count`` is that of the finite values.

    Attributes:
        nan: Number of NaN values.
        inf: Number of infinite values.
        zero: Number of values that are exactly 0.
        unit: `MAGNITUDE` if complex numbers count by their magnitude; empty for other numbers, which are themselves.
        reason: Why values are left out; empty if all were measured. Without any value, all moments are NaN.
    """

    nan: int = 0
    inf: int = 0
    zero: int = 0
    unit: str = ""
    reason: str = ""

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``inspect --json --stats``."""
        names = ("norm", "mean", "std", "min", "max", "nan", "inf", "zero")
        notes = {name: text for name in ("unit", "reason") if (text := getattr(self, name))}
        return {name: getattr(self, name) for name in names} | notes

    def repeat(self, times: int) -> TensorStatistics:
        """Return the statistics of the same values, each of which occurs several times."""
        if times == 1 or self.reason:
            return self
        counts = {name: times * getattr(self, name) for name in ("count", "m2", "nan", "inf", "zero")}
        return replace(self, **counts)


def merge(parts: Iterable[TensorStatistics]) -> TensorStatistics:
    """Return the statistics of several tensors as if they were one; ``reason`` says how many are left out, and why."""
    parts = list(parts)
    units = {part.unit for part in parts if part.count}
    failed = [part.reason for part in parts if part.reason]
    reason = f"without {len(failed)} of {len(parts)} tensors: {failed[0]}" if failed else ""
    whole = merge_blocks(parts)
    return replace(whole, unit=MIXED_UNIT if len(units) > 1 else "".join(units), reason=reason)


def merge_blocks(parts: list[TensorStatistics]) -> TensorStatistics:
    """Return the statistics of several blocks of one tensor, all of which were measured."""
    if len(parts) == 1:
        return parts[0]
    moments = merge_moments(parts)
    counts = (sum(getattr(part, name) for part in parts) for name in ("nan", "inf", "zero"))
    return TensorStatistics(moments.count, moments.mean, moments.m2, moments.min, moments.max, *counts)


def measure_block(values: Array) -> TensorStatistics:
    """Measure a flat, aligned array that fits a cache. Complex numbers count by their magnitude."""
    if not values.size:
        return TensorStatistics()
    values = _to_kernel_dtype(values)
    size, (total, sum_sq, low, high) = values.size, kernels().sums(values)
    if not math.isfinite(total):
        return _measure_finite(values)
    if low == high:
        return TensorStatistics(size, low, 0.0, low, high, zero=0 if low else size)
    zero = _count_zero(values) if low <= 0 <= high else 0
    mean = total / size
    m2 = sum_sq - total * mean
    if not sum_sq < _MAX_CANCELLATION * m2:
        mean, m2 = _mean_and_m2(values, mean)
    return TensorStatistics(size, mean, m2, low, high, zero=zero)


def _count_zero(values: Array) -> int:
    import numpy as np

    nonzero = values != 0
    return 0 if nonzero.all() else values.size - int(np.count_nonzero(nonzero))


def _to_kernel_dtype(values: Array) -> Array:
    import numpy as np

    dtype = values.dtype
    if dtype.char in KERNEL_DTYPES:
        return values
    if dtype.kind == "c":
        with np.errstate(all="ignore"):
            magnitudes: Array = np.abs(values.astype("c16"))
            return magnitudes
    if dtype.kind == "b":
        return values.view("u1")
    return values.astype("f4" if dtype.itemsize <= 2 else "f8")


def _mean_and_m2(values: Array, center: float) -> tuple[float, float]:
    """Return the mean and the sum of squared deviations from it, by way of deviations from a value close to it."""
    import numpy as np

    with np.errstate(all="ignore"):
        deviations = values.astype("f8") - center
        shift = float(deviations.sum()) / values.size
        m2 = kernels().sum_sq(deviations) - values.size * shift * shift
    return center + shift, max(0.0, m2) if math.isfinite(m2) else math.inf


def _measure_finite(values: Array) -> TensorStatistics:
    """Measure the finite values of floats, and count the others."""
    import numpy as np

    finite = values[np.isfinite(values)]
    if finite.size < values.size:
        nan = int(np.count_nonzero(np.isnan(values)))
        return replace(measure_block(finite), nan=nan, inf=values.size - finite.size - nan)
    # The sum of large float64 numbers overflows.
    mean, zero = float((values / values.size).sum()), int(np.count_nonzero(values == 0))
    return TensorStatistics(values.size, mean, math.inf, float(values.min()), float(values.max()), zero=zero)
