"""Merge the count, mean, sum of squared deviations, minimum and maximum of parts into those of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Moments:
    """The moments of some values; without any value all are NaN but ``count`` and ``m2``.

    Attributes:
        count: Number of values.
        mean: Their mean.
        m2: Sum of their squared deviations from the mean (Welford's M2).
        min: The smallest; NaN if any value is NaN.
        max: The largest; NaN if any value is NaN.
    """

    count: int = 0
    mean: float = math.nan
    m2: float = 0.0
    min: float = math.nan
    max: float = math.nan

    @property
    def norm(self) -> float:
        """The L2 norm of the values as one vector."""
        return math.sqrt(self.m2 + self.count * self.mean * self.mean) if self.count else math.nan

    @property
    def std(self) -> float:
        """The population standard deviation (divided by n, not n - 1)."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Combine the moments of disjoint parts by the formula of Chan, Golub and LeVeque (1979).

    An infinite or NaN value makes ``mean`` infinite or NaN and ``m2`` NaN, as computing them from all values would.

    Args:
        parts: In any order; empty ones are skipped.

    Example:
        >>> whole = merge_moments([Moments(2, 1.5, 0.5, 1.0, 2.0), Moments(1, 6.0, 0.0, 6.0, 6.0)])
        >>> whole.count, whole.mean, whole.m2, whole.min, whole.max
        (3, 3.0, 14.0, 1.0, 6.0)
    """
    filled = [part for part in parts if part.count]
    if not filled:
        return Moments()
    count = sum(part.count for part in filled)
    mean = sum(part.count * part.mean for part in filled) / count
    m2 = sum(part.m2 + part.count * (part.mean - mean) * (part.mean - mean) for part in filled)
    lows, highs = [part.min for part in filled], [part.max for part in filled]
    # Python's min and max overlook NaN.
    low = math.nan if any(map(math.isnan, lows)) else min(lows)
    high = math.nan if any(map(math.isnan, highs)) else max(highs)
    return Moments(count, mean, m2, low, high)
