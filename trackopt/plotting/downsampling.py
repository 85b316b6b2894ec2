"""Reduce long series to the points that a picture can show; no spike is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trackopt.journal.columns import Series

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = 2000
_POINTS_PER_COLUMN = 4


def select_points(series: Series, columns: int = COLUMNS) -> Series:
    """Return the first, lowest, highest and last point of each column, and the first that is not finite.

    A series of no more points than that is returned whole.

    Example:
        >>> spiky = Series(np.arange(1000), np.where(np.arange(1000) == 567, 100.0, 0.0))
        >>> len(select_points(spiky, 10)), select_points(spiky, 10).values.max()
        (22, np.float64(100.0))
    """
    if len(series) <= _POINTS_PER_COLUMN * columns:
        return series
    span = float(series.steps[-1] - series.steps[0]) or 1.0
    places = ((series.steps - series.steps[0]) / (span / columns)).astype(np.int64)
    begins = np.flatnonzero(np.append(True, places[1:] != places[:-1]))
    is_finite = np.isfinite(series.values)
    numbers = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(series))))
    kept = [_first_where(~is_finite, numbers)]
    if is_finite.any():
        lows = np.minimum.reduceat(np.where(is_finite, series.values, np.inf), begins)
        highs = np.maximum.reduceat(np.where(is_finite, series.values, -np.inf), begins)
        kept += [
            _first_where(is_finite, numbers),
            _first_where(is_finite & (series.values == lows[numbers]), numbers),
            _first_where(is_finite & (series.values == highs[numbers]), numbers),
            len(series) - 1 - _first_where(is_finite[::-1], numbers[::-1]),
        ]
    chosen = np.unique(np.concatenate(kept))
    return Series(series.steps[chosen], series.values[chosen])


def downsample_series(series: Series, columns: int = COLUMNS) -> list[tuple[float, float]]:
    """Return the points of a curve; it has a gap where a value is not finite."""
    return list(select_points(series, columns))


def downsample_band(
    steps: NDArray[np.int64], lows: NDArray[np.float64], highs: NDArray[np.float64], columns: int = COLUMNS
) -> list[tuple[float, float, float]]:
    """Return the edges ``(x, low, high)`` of a band where they are finite: of each column the lowest and the highest.

    Example:
        >>> downsample_band(np.arange(4), np.array([0.0, 1, 2, 3]), np.array([4.0, 5, 6, np.nan]), columns=2)
        [(0, 0.0, 5.0), (2, 2.0, 6.0)]
    """
    is_finite = np.isfinite(lows) & np.isfinite(highs)
    steps, lows, highs = steps[is_finite], lows[is_finite], highs[is_finite]
    if not len(steps):
        return []
    begins = np.arange(0, len(steps), -(-len(steps) // columns))
    edges = steps[begins], np.minimum.reduceat(lows, begins), np.maximum.reduceat(highs, begins)
    return list(zip(*(edge.tolist() for edge in edges), strict=True))


def _first_where(condition: NDArray[np.bool_], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first index of each stretch of equal numbers at which the condition holds."""
    found: NDArray[np.int64] = np.flatnonzero(condition)
    is_first: NDArray[np.bool_] = np.append(True, np.diff(numbers[found]) != 0)[: len(found)]
    return np.compress(is_first, found)
