"""Curves and panels, which ``terminal`` and ``matplotlib`` draw; downsampling, smoothing and axis ticks; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Point = tuple[float, float]

#: Marks of the curves, which also work without colour.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LOG_RANGE = 100.0  # highest / lowest, above which low values would look equal on a linear axis
_MIN_LOG_VALUE = 1e-300  # below it the arithmetic of logarithmic axes underflows
_MAX_EXTREMA = 12  # times that a curve may cross its range before it counts as noisy


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        name: The name in the legend.
        points: ``(x, y)``, ascending in x; the line has a gap where y is not finite.
        band: ``(x, low, high)`` of the area around it; empty for none.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Attributes:
        title: The quantity of the y axis.
        curves: The curves in the order of the legend.
        log: True for a logarithmic y axis; then all values are positive.
    """

    title: str
    curves: tuple[Curve, ...]
    log: bool = False

    def bounds(self) -> tuple[float, float, float, float] | None:
        """Return the least and greatest x and the least and greatest y; ``None`` without finite points."""
        points = [point for curve in self.curves for point in curve.points if math.isfinite(point[1])]
        edges = [(x, y) for curve in self.curves for x, *ends in curve.band for y in ends if math.isfinite(y)]
        if not points:
            return None
        xs, ys = zip(*points, *edges, strict=True)
        return min(xs), max(xs), min(ys), max(ys)

    def with_log_scale(self) -> Panel:
        """Return the panel with a logarithmic y axis if all values are positive and span over two decades."""
        bounds = self.bounds()
        if bounds is None or bounds[2] < _MIN_LOG_VALUE or bounds[3] / _LOG_RANGE < bounds[2]:
            return self
        return replace(self, title=f"{self.title} (log)", log=True)

    def downsample(self, columns: int = 2000) -> Panel:
        """Return the panel with no more points than so many columns can show."""
        return replace(self, curves=tuple(_downsample_curve(curve, columns) for curve in self.curves))


def downsample(points: Sequence[Point], columns: int) -> list[list[Point]]:
    """Reduce a curve to the points that so many columns can show, split at its gaps.

    The first, lowest, highest and last point of each column are kept, so that no spike is lost.

    Example:
        >>> spiky = [(x, 100.0 if x == 567 else 0.0) for x in range(1000)]
        >>> (piece,) = downsample(spiky, 10)
        >>> len(piece), max(y for _, y in piece)
        (22, 100.0)
    """
    pieces = list(split_at_gaps(points))
    if len(points) <= 4 * columns:
        return pieces
    first, span = points[0][0], (points[-1][0] - points[0][0]) or 1.0
    return [
        [point for column in _split_columns(piece, first, span / columns) for point in _keep_extremes(column)]
        for piece in pieces
    ]


def _downsample_curve(curve: Curve, columns: int) -> Curve:
    points: list[Point] = []
    for piece in downsample(curve.points, columns):
        points += [(piece[0][0], math.nan), *piece] if points else piece  # keep the gap
    band = [edge for edge in curve.band if all(map(math.isfinite, edge))]
    stride = -(-len(band) // columns) or 1
    return replace(curve, points=points, band=[_merge_band(band[i : i + stride]) for i in range(0, len(band), stride)])


def _merge_band(edges: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    return edges[0][0], min(low for _, low, _ in edges), max(high for _, _, high in edges)


def smooth(curve: Curve, columns: int, max_swings: int = _MAX_EXTREMA) -> Curve:
    """Replace a noisy curve by the median of each column, with a band from the lowest to the highest value.

    A curve that is not noisy is returned unchanged.

    Example:
        >>> noisy = Curve("loss", [(x, float(x % 3)) for x in range(900)])
        >>> smooth(noisy, 2).points, smooth(noisy, 2).band
        ([(0, 1.0), (450, 1.0)], [(0, 0.0, 2.0), (450, 0.0, 2.0)])
    """
    if len(curve.points) <= columns or not _is_noisy(curve.points, max_swings):
        return curve
    first, width = curve.points[0][0], (curve.points[-1][0] - curve.points[0][0] + 1) / columns
    points: list[Point] = []
    band: list[tuple[float, float, float]] = []
    for piece in split_at_gaps(curve.points):
        for column in _split_columns(piece, first, width):
            ys = sorted(y for _, y in column)
            points.append((column[0][0], ys[len(ys) // 2]))
            band.append((column[0][0], ys[0], ys[-1]))
    return replace(curve, points=points, band=curve.band or band)


def _is_noisy(points: Sequence[Point], max_swings: int) -> bool:
    ys = [y for _, y in points if math.isfinite(y)]
    path_length = sum(abs(after / 2 - before / 2) for before, after in pairwise(ys))
    return bool(ys) and path_length > max_swings * (max(ys) / 2 - min(ys) / 2)


def compute_ticks(low: float, high: float, count: int) -> list[float]:
    """Choose round numbers from ``low`` to ``high``.

    Example:
        >>> compute_ticks(0.0, 0.5, 5)
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    ideal = (high / 2 - low / 2) * 2 / max(count, 1)
    if not (0 < ideal < math.inf):
        return [low] if low == high else [low, high]
    power = 10.0 ** math.floor(math.log10(ideal))
    spacing = next((power * factor for factor in (1, 2, 5) if power * factor >= ideal * 0.99), power * 10)
    if not spacing or math.isinf(spacing):
        return [low, high]
    start, end = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    values = [float(f"{number * spacing:.12g}") for number in range(start, end + 1)]
    return [value for value in values if math.isfinite(value)]


def compute_log_ticks(low: float, high: float, count: int) -> list[float]:
    """Choose exponents for a logarithmic axis: powers of ten, and 2 and 5 times these if there is room.

    Example:
        >>> [round(10**exponent, 2) for exponent in compute_log_ticks(-1.0, 1.0, 7)]
        [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    values: list[float] = []
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        candidates = [power + math.log10(factor) for power in powers for factor in factors]
        values = [value for value in candidates if low - 1e-9 <= value <= high + 1e-9]
        if len(values) <= count:
            return values
    return values[:: -(-len(values) // max(count, 1))]


def split_at_gaps(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Yield the stretches of a curve between its gaps.

    Example:
        >>> list(split_at_gaps([(1, 0.5), (2, float("nan")), (3, 0.4)]))
        [[(1, 0.5)], [(3, 0.4)]]
    """
    piece: list[Point] = []
    for point in points:
        if math.isfinite(point[1]):
            piece.append(point)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _split_columns(piece: list[Point], first: float, width: float) -> Iterator[list[Point]]:
    column: list[Point] = []
    number = -1
    for point in piece:
        if (here := int((point[0] - first) / width)) != number and column:
            yield column
            column = []
        number = here
        column.append(point)
    yield column


def _keep_extremes(column: list[Point]) -> list[Point]:
    if len(column) <= 2:
        return column
    ys = [y for _, y in column]
    kept = {0, ys.index(min(ys)), ys.index(max(ys)), len(ys) - 1}
    return [column[index] for index in sorted(kept)]
