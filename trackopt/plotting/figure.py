"""Figures: curves in panels, drawn on a terminal (``terminal``) or on paper (``paper``); no torch.

What is drawn is decided elsewhere; here are the shapes of it, and how a long series becomes a short one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Point = tuple[float, float]

#: How curves are told apart where there is no colour.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LOG_RANGE = 100.0  # from the lowest value to the highest, and the low ones could not be told apart
_MIN_LOG_VALUE = 1e-300  # below it the arithmetic of logarithmic axes underflows
_MAX_EXTREMA = 12  # how often a curve may go from end to end and not count as noise


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        name: What the legend calls it.
        points: ``(x, y)``, ascending in x; where y is not finite, the line has a gap.
        band: ``(x, low, high)`` of the area around it; empty for none.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """Curves over the same axes.

    Attributes:
        title: What the y axis measures.
        curves: In the order of the legend.
        log: Whether the y axis is logarithmic; then all values are positive.
    """

    title: str
    curves: tuple[Curve, ...]
    log: bool = False

    def bounds(self) -> tuple[float, float, float, float] | None:
        """The least and the greatest x and y that are to be seen; ``None`` where there is nothing."""
        points = [point for curve in self.curves for point in curve.points if math.isfinite(point[1])]
        edges = [(x, y) for curve in self.curves for x, *ends in curve.band for y in ends if math.isfinite(y)]
        if not points:
            return None
        xs, ys = zip(*points, *edges, strict=True)
        return min(xs), max(xs), min(ys), max(ys)

    def scaled(self) -> Panel:
        """The same with a logarithmic y axis, if all values are positive and reach over two decades."""
        bounds = self.bounds()
        if bounds is None or bounds[2] < _MIN_LOG_VALUE or bounds[3] / _LOG_RANGE < bounds[2]:
            return self
        return replace(self, title=f"{self.title} (log)", log=True)

    def downsampled(self, columns: int = 2000) -> Panel:
        """The same to the eye, with no more points than so many columns need."""
        return replace(self, curves=tuple(_lean(curve, columns) for curve in self.curves))


def downsample(points: Sequence[Point], columns: int) -> list[list[Point]]:
    """The unbroken pieces of a curve, with no more points than can be seen in so many columns.

    Of the points in a column the first, the lowest, the highest and the last stay, so that no spike is lost.

    Example:
        >>> spiky = [(x, 100.0 if x == 567 else 0.0) for x in range(1000)]
        >>> (piece,) = downsample(spiky, 10)
        >>> len(piece), max(y for _, y in piece)
        (22, 100.0)
    """
    whole = list(pieces(points))
    if len(points) <= 4 * columns:
        return whole
    first, span = points[0][0], (points[-1][0] - points[0][0]) or 1.0
    return [
        [point for column in _columns(piece, first, span / columns) for point in _extremes(column)] for piece in whole
    ]


def _lean(curve: Curve, columns: int) -> Curve:
    points: list[Point] = []
    for piece in downsample(curve.points, columns):
        points += [(piece[0][0], math.nan), *piece] if points else piece  # the gap stays one
    band = [edge for edge in curve.band if all(map(math.isfinite, edge))]
    pace = -(-len(band) // columns) or 1
    return replace(curve, points=points, band=[_widest(band[i : i + pace]) for i in range(0, len(band), pace)])


def _widest(edges: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    return edges[0][0], min(low for _, low, _ in edges), max(high for _, _, high in edges)


def smooth(curve: Curve, columns: int, swings: int = _MAX_EXTREMA) -> Curve:
    """A noisy curve as the median of each column, in a band that reaches from end to end; another one as it is.

    Example:
        >>> noisy = Curve("loss", [(x, float(x % 3)) for x in range(900)])
        >>> smooth(noisy, 2).points, smooth(noisy, 2).band
        ([(0, 1.0), (450, 1.0)], [(0, 0.0, 2.0), (450, 0.0, 2.0)])
    """
    if len(curve.points) <= columns or not _is_noisy(curve.points, swings):
        return curve
    first, width = curve.points[0][0], (curve.points[-1][0] - curve.points[0][0] + 1) / columns
    points: list[Point] = []
    band: list[tuple[float, float, float]] = []
    for piece in pieces(curve.points):
        for column in _columns(piece, first, width):
            ys = sorted(y for _, y in column)
            points.append((column[0][0], ys[len(ys) // 2]))
            band.append((column[0][0], ys[0], ys[-1]))
    return replace(curve, points=points, band=curve.band or band)


def _is_noisy(points: Sequence[Point], swings: int) -> bool:
    ys = [y for _, y in points if math.isfinite(y)]
    way = sum(abs(after / 2 - before / 2) for before, after in pairwise(ys))
    return bool(ys) and way > swings * (max(ys) / 2 - min(ys) / 2)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from ``low`` to ``high``.

    Example:
        >>> ticks(0.0, 0.5, 5)
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    rough = (high / 2 - low / 2) * 2 / max(about, 1)
    if not (0 < rough < math.inf):
        return [low] if low == high else [low, high]
    power = 10.0 ** math.floor(math.log10(rough))
    pace = next((power * factor for factor in (1, 2, 5) if power * factor >= rough * 0.99), power * 10)
    if not pace or math.isinf(pace):
        return [low, high]
    start, end = math.ceil(low / pace - 1e-9), math.floor(high / pace + 1e-9)
    found = [float(f"{number * pace:.12g}") for number in range(start, end + 1)]
    return [value for value in found if math.isfinite(value)]


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """The same for the exponents of a logarithmic axis: powers of ten, and 2 and 5 times these if there is room.

    Example:
        >>> [round(10**exponent, 2) for exponent in log_ticks(-1.0, 1.0, 7)]
        [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    found: list[float] = []
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        every = [power + math.log10(factor) for power in powers for factor in factors]
        found = [value for value in every if low - 1e-9 <= value <= high + 1e-9]
        if len(found) <= about:
            return found
    return found[:: -(-len(found) // max(about, 1))]


def pieces(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The stretches of a curve between its gaps.

    Example:
        >>> list(pieces([(1, 0.5), (2, float("nan")), (3, 0.4)]))
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


def _columns(piece: list[Point], first: float, width: float) -> Iterator[list[Point]]:
    column: list[Point] = []
    number = -1
    for point in piece:
        if (here := int((point[0] - first) / width)) != number and column:
            yield column
            column = []
        number = here
        column.append(point)
    yield column


def _extremes(column: list[Point]) -> list[Point]:
    if len(column) <= 2:
        return column
    ys = [y for _, y in column]
    kept = {0, ys.index(min(ys)), ys.index(max(ys)), len(ys) - 1}
    return [column[index] for index in sorted(kept)]
