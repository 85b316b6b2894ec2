"""Distance of two tensors, as float64 sums that can be accumulated piece by piece.

Elements with equal bits are equal, NaN and infinity too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.utils.kernels import FLOATS, kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.archive.decode import Array
    from trackopt.utils.types import JsonObject


_FEW = 64  # share of the elements, as its reciprocal, that are selected faster than all are converted


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Numbers are equal if ``|a - b| <= atol + rtol * max(|a|, |b|)``."""

    atol: float = 0.0
    rtol: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.atol or self.rtol)

    def covers(self, a: float, b: float) -> bool:
        """Return True if two numbers are equal within the tolerance."""
        try:
            return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= self.atol + self.rtol * max(abs(a), abs(b))
        except OverflowError:  # integers beyond any float
            return False


@dataclass(frozen=True, slots=True)
class Numbers:
    """Sums of a comparison of tensors; add them for several tensors.

    Attributes:
        sum_sq_a: Sum of squares of the first.
        sum_sq_b: Sum of squares of the second.
        dot: Sum of their products.
        sum_sq_diff: Sum of squares of their difference.
        max_abs: Largest absolute difference of an element; NaN if one became NaN.
        differing: Elements that differ: in a bit if the dtype is the same, in value if not.
        elements: Number of elements.
        beyond_tolerance: Elements that differ by more than the tolerance.
        ulp: Largest distance in units in the last place; None unless both have the same floating dtype.
        differing_after_cast: Elements that differ after the cast to the less precise dtype; None without a cast.
        nan: Number of NaN elements that appeared, and that vanished.
        inf: The same of infinite elements.
    """

    sum_sq_a: float = 0.0
    sum_sq_b: float = 0.0
    dot: float = 0.0
    sum_sq_diff: float = 0.0
    max_abs: float = 0.0
    differing: int = 0
    elements: int = 0
    beyond_tolerance: int = 0
    ulp: int | None = None
    differing_after_cast: int | None = None
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)

    @property
    def rel_l2(self) -> float:
        """Norm of the difference relative to the norm of the first; infinite if that is zero."""
        if self.sum_sq_a == 0:
            return math.inf if self.sum_sq_diff else 0.0
        return math.sqrt(self.sum_sq_diff / self.sum_sq_a)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two; None if one of them is zero."""
        if self.sum_sq_a == 0 or self.sum_sq_b == 0:
            return None
        cosine = self.dot / math.sqrt(self.sum_sq_a) / math.sqrt(self.sum_sq_b)
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine

    @property
    def share(self) -> float:
        """Fraction of the elements that differ."""
        return self.differing / self.elements if self.elements else 0.0

    def as_dict(self) -> JsonObject:
        """Return the numbers under the keys of ``diff --json``."""
        result = {name: getattr(self, name) for name in ("max_abs", "rel_l2", "cosine", "differing", "elements")}
        result |= {"share": self.share, "ulp": self.ulp}
        for name, (appeared, vanished) in (("nan", self.nan), ("inf", self.inf)):
            result[name] = {"appeared": appeared, "vanished": vanished}
        return result

    def repeat(self, times: int) -> Numbers:
        """Return the numbers of tensors each of whose elements occurs several times."""
        if times == 1:
            return self
        names = ("sum_sq_a", "sum_sq_b", "dot", "sum_sq_diff", "differing", "elements", "beyond_tolerance")
        sums: dict[str, Any] = {name: times * getattr(self, name) for name in names}
        if self.differing_after_cast is not None:
            sums["differing_after_cast"] = times * self.differing_after_cast
        nan, inf = ((times * appeared, times * vanished) for appeared, vanished in (self.nan, self.inf))
        return replace(self, **sums, nan=nan, inf=inf)

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(
            self.sum_sq_a + other.sum_sq_a,
            self.sum_sq_b + other.sum_sq_b,
            self.dot + other.dot,
            self.sum_sq_diff + other.sum_sq_diff,
            math.nan if math.isnan(self.max_abs + other.max_abs) else max(self.max_abs, other.max_abs),
            self.differing + other.differing,
            self.elements + other.elements,
            self.beyond_tolerance + other.beyond_tolerance,
            other.ulp if self.ulp is None else max(self.ulp, other.ulp or 0),
            other.differing_after_cast
            if self.differing_after_cast is None
            else self.differing_after_cast + (other.differing_after_cast or 0),
            (self.nan[0] + other.nan[0], self.nan[1] + other.nan[1]),
            (self.inf[0] + other.inf[0], self.inf[1] + other.inf[1]),
        )


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What a comparison returns of tensors that cannot be read.

    Attributes:
        reason: Why, with the file.
    """

    reason: str


def count_only(different: Array) -> Numbers:
    """Return the numbers of arrays whose elements are no numbers: only how many of them differ."""
    import numpy as np

    count, nan = int(np.count_nonzero(different)), math.nan
    return Numbers(nan, nan, nan, nan, nan, count, different.size, count)


def measure_one(x: Array) -> Numbers:
    """Return the numbers of a flat, aligned array compared with itself."""
    sum_sq = kernels().sum_sq(x) if x.dtype.char in FLOATS and x.size else math.nan
    if not math.isfinite(sum_sq):
        x = _to_float64(x)
        sum_sq = _dot(x, x)
    return Numbers(sum_sq, sum_sq, sum_sq, elements=x.size)


def measure_pair(x: Array, y: Array, different: Array, tolerance: Tolerance) -> Numbers:
    """Return the numbers of two flat, aligned arrays.

    Args:
        x: The first.
        y: The second.
        different: Mask of the elements that differ.
        tolerance: Elements that differ by no more are not counted as beyond it.
    """
    import numpy as np

    count = int(np.count_nonzero(different))
    if not tolerance and x.dtype == y.dtype and x.dtype.char in FLOATS and x.size:
        result = _measure_floats(x, y, count)
        if math.isfinite(result.sum_sq_a + result.sum_sq_b):
            return result
    with np.errstate(all="ignore"):
        a, b = _to_float64(x), _to_float64(y)
        sum_sq_a, sum_sq_b = _dot(a, a), _dot(b, b)
        if not count and math.isfinite(sum_sq_a):
            return Numbers(sum_sq_a, sum_sq_b, sum_sq_a, elements=x.size)
        difference = np.subtract(b, a)
        is_finite = math.isfinite(sum_sq_a + sum_sq_b)
        if not is_finite:
            difference[~_expand_complex(different, x)] = 0  # inf - inf is NaN
        distance = np.abs(difference.view("c16")) if x.dtype.kind == "c" else difference
        max_abs = max(float(distance.max()), -float(distance.min()))
        beyond = count
        if tolerance:
            beyond = int(np.count_nonzero(different & _outside_tolerance(x, y, np.abs(distance), tolerance)))
        nan, inf = ((0, 0), (0, 0)) if is_finite else (_count_new(np.isnan, x, y), _count_new(np.isinf, x, y))
        sum_sq_diff = _dot(difference, difference)
        return Numbers(sum_sq_a, sum_sq_b, _dot(a, b), sum_sq_diff, max_abs, count, x.size, beyond, nan=nan, inf=inf)


def _measure_floats(x: Array, y: Array, count: int) -> Numbers:
    """Return the numbers of two arrays of one floating dtype, if all elements are finite and so are the sums."""
    k = kernels()
    sum_sq_a, sum_sq_b = k.sum_sq(x), k.sum_sq(y)
    if not math.isfinite(sum_sq_a + sum_sq_b) or not count:
        return Numbers(sum_sq_a, sum_sq_b, sum_sq_a, elements=x.size)
    dot, sum_sq_diff = k.dot(x, y), k.squared_distance(x, y)
    return Numbers(sum_sq_a, sum_sq_b, dot, sum_sq_diff, _max_abs(x, y), count, x.size, count)


def _max_abs(x: Array, y: Array) -> float:
    """Return the largest absolute difference, computed in float64.

    Rounding keeps the order: where the difference in float64 is largest, so is the one rounded to float32.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        difference = y - x
        low, high = difference.min(), difference.max()
        largest = max(-low, high)
        if difference.dtype.itemsize == 8:
            return float(largest)
        is_largest = difference == high if high == largest else difference == low
        if -low == high:
            is_largest |= difference == low
        if np.count_nonzero(is_largest) < x.size // _FEW:
            x, y = x[is_largest], y[is_largest]
        exact = y.astype("f8")
        exact -= x
        return max(float(exact.max()), -float(exact.min()))


def _to_float64(array: Array) -> Array:
    """Convert to float64, complex numbers to their two parts."""
    return array.astype("c16").view("f8") if array.dtype.kind == "c" else array.astype("f8")


def _expand_complex(mask: Array, like: Array) -> Array:
    return mask.repeat(2) if like.dtype.kind == "c" else mask


def _dot(x: Array, y: Array) -> float:
    import numpy as np

    # einsum and not dot: BLAS would start threads of its own in each of ours.
    return float(np.einsum("i,i->", x, y))


def _outside_tolerance(x: Array, y: Array, distance: Array, tolerance: Tolerance) -> Array:
    import numpy as np

    bound = tolerance.atol + tolerance.rtol * np.maximum(np.abs(x), np.abs(y)).astype("f8")
    finite = np.isfinite(x) & np.isfinite(y)
    outside: Array = ~(finite & (distance <= bound)) & ~(np.isnan(x) & np.isnan(y))
    return outside


def _count_new(predicate: Callable[[Array], Array], x: Array, y: Array) -> tuple[int, int]:
    """Count the elements that satisfy a predicate only in ``y``, and only in ``x``."""
    import numpy as np

    before, after = predicate(x), predicate(y)
    return int(np.count_nonzero(after & ~before)), int(np.count_nonzero(before & ~after))
