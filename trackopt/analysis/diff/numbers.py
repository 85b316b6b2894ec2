"""How far two tensors are apart, in sums that can be taken piece by piece.

Sums are kept in float64. Elements whose bits are equal are equal, NaN and infinity too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackopt.archive.decode import Array


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What is called equal: ``|a - b| <= atol + rtol * max(|a|, |b|)``."""

    atol: float = 0.0
    rtol: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.atol or self.rtol)

    def covers(self, a: float, b: float) -> bool:
        """Whether two numbers are equal by it."""
        try:
            return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= self.atol + self.rtol * max(abs(a), abs(b))
        except OverflowError:  # integers beyond any float
            return False


@dataclass(frozen=True, slots=True)
class Numbers:
    """What comparing tensors adds up to; that of several tensors is the sum of theirs.

    Attributes:
        sum_sq_a: Sum of squares of the one.
        sum_sq_b: Sum of squares of the other.
        dot: Sum of their products.
        sum_sq_diff: Sum of squares of their difference.
        max_abs: Largest difference of an element; NaN if one became NaN.
        differing: Elements that differ: in a bit if the dtype is the same, in value if not.
        elements: All elements.
        beyond_tolerance: Elements that differ by more than the tolerance.
        ulp: Largest distance in units in the last place; None where the dtype is none of floats, or not the same.
        uncast: Elements that still differ when one is cast to the other's dtype; None where nothing was cast.
        nan: How many appeared, and how many vanished.
        inf: The same of infinite ones.
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
    uncast: int | None = None
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)

    @property
    def rel_l2(self) -> float:
        """Length of the difference over the length of the first; infinite if that is zero."""
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
        """The part of the elements that differ."""
        return self.differing / self.elements if self.elements else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The numbers under the keys of ``diff --json``."""
        result = {name: getattr(self, name) for name in ("max_abs", "rel_l2", "cosine", "differing", "elements")}
        result |= {"share": self.share, "ulp": self.ulp}
        for name, (appeared, vanished) in (("nan", self.nan), ("inf", self.inf)):
            result[name] = {"appeared": appeared, "vanished": vanished}
        return result

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
            other.uncast if self.uncast is None else self.uncast + (other.uncast or 0),
            (self.nan[0] + other.nan[0], self.nan[1] + other.nan[1]),
            (self.inf[0] + other.inf[0], self.inf[1] + other.inf[1]),
        )


def measure_one(x: Array) -> Numbers:
    """The numbers of values compared with themselves."""
    x = _wide(x)
    length = _dot(x, x)
    return Numbers(length, length, length, elements=x.size)


def measure_pair(x: Array, y: Array, different: Array, tolerance: Tolerance) -> Numbers:
    """The numbers of two flat arrays.

    Args:
        x: The one's values.
        y: The other's.
        different: Which of them differ.
        tolerance: What of that is called equal.
    """
    import numpy as np

    count, whole = int(np.count_nonzero(different)), x.size
    with np.errstate(all="ignore"):
        a, b = _wide(x), _wide(y)
        aa, bb = _dot(a, a), _dot(b, b)
        if not count and math.isfinite(aa):
            return Numbers(aa, bb, aa, elements=whole)
        gap = np.subtract(b, a)
        odd = not math.isfinite(aa + bb)
        if odd:
            gap[~_parts(different, x)] = 0  # infinity less infinity is no difference
        far = np.abs(gap.view("c16")) if x.dtype.kind == "c" else gap
        max_abs = max(float(far.max()), -float(far.min()))
        beyond = int(np.count_nonzero(different & _outside(x, y, np.abs(far), tolerance))) if tolerance else count
        nan, inf = _nonfinite(x, y) if odd else ((0, 0), (0, 0))
        return Numbers(aa, bb, _dot(a, b), _dot(gap, gap), max_abs, count, whole, beyond, nan=nan, inf=inf)


def _wide(array: Array) -> Array:
    """As float64; complex numbers as their two parts."""
    return array.astype("c16").view("f8") if array.dtype.kind == "c" else array.astype("f8")


def _parts(different: Array, like: Array) -> Array:
    return different.repeat(2) if like.dtype.kind == "c" else different


def _dot(x: Array, y: Array) -> float:
    import numpy as np

    # einsum and not dot: BLAS would start threads of its own in each of ours.
    return float(np.einsum("i,i->", x, y))


def _outside(x: Array, y: Array, far: Array, tolerance: Tolerance) -> Array:
    import numpy as np

    bound = tolerance.atol + tolerance.rtol * np.maximum(np.abs(x), np.abs(y)).astype("f8")
    finite = np.isfinite(x) & np.isfinite(y)
    outside: Array = ~(finite & (far <= bound)) & ~(np.isnan(x) & np.isnan(y))
    return outside


def _nonfinite(x: Array, y: Array) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many NaN and how many infinite values appear and vanish."""
    import numpy as np

    found = []
    for is_odd in (np.isnan, np.isinf):
        before, after = is_odd(x), is_odd(y)
        found.append((int(np.count_nonzero(after & ~before)), int(np.count_nonzero(before & ~after))))
    return found[0], found[1]
