"""Draw a panel on a terminal with braille dots, two by four in a character, between axes with round numbers."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from trackopt.plotting.figure import LETTERS, Curve, Panel, Point, compute_log_ticks, compute_ticks, downsample, smooth

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a character, by column and row
_CROWDED_CURVES = 5  # from this number on, curves have no bands and are smoothed more strongly
_COLUMNS_PER_MEDIAN = 4
_MAX_SWINGS = 2  # of a crowded curve that is not smoothed
_LABEL_STRIDE = 3  # letters along one curve
_LABEL_MARGIN = 4  # columns for letters right of the canvas
_MIN_WIDTH = 10
_INDENT = 2


def render(panel: Panel, *, width: int, height: int, coloured: bool, legend: bool = True) -> Text:
    """Render a panel as lines of text.

    Several curves have letters at their ends, and along them if colours cannot distinguish them. Each is then drawn as
    the median per column in a band from the lowest to the highest value; many curves as medians of several columns.

    Args:
        panel: The panel to draw.
        width: Total columns.
        height: Rows of the canvas, without title, legend and x axis.
        coloured: True if the terminal shows colours.
        legend: False if the caller prints the legend.

    Example:
        >>> print(render(Panel("lr", (Curve("", [(1, 0.0), (2, 1.0)]),)), width=24, height=3, coloured=False))
          lr
             1 ┤        ⣀⠤⠒⠉
               │    ⣀⠤⠒⠉
             0 ┤⣀⠤⠒⠉
               └┬──────────┬
          step  1          2
    """
    lines = [Text(f"{' ' * _INDENT}{panel.title}", style="bold")]
    if panel.log:
        panel = replace(panel, curves=tuple(map(_to_exponents, panel.curves)))
    crowded = len(panel.curves) >= _CROWDED_CURVES
    if crowded:
        panel = replace(
            panel, curves=tuple(_smooth_strongly(curve, width // _COLUMNS_PER_MEDIAN) for curve in panel.curves)
        )
    bounds = panel.bounds()
    if bounds is None:
        return Text("\n").join([*lines, Text(f"{' ' * _INDENT}nothing to draw yet")])
    if legend and len(panel.curves) > 1:
        lines.append(_render_legend(panel, width))
    canvas = _Canvas(bounds, width, height, log=panel.log)
    smoothed = len(panel.curves) > 1 and not crowded
    curves = [smooth(curve, canvas.width) if smoothed else curve for curve in panel.curves]
    canvas.draw(curves, letters_along=not coloured or len(curves) > len(_COLOURS))
    return Text("\n").join([*lines, *canvas.render_rows(), *canvas.render_x_axis()])


def curve_letter(index: int) -> str:
    """Return the letter of the n-th curve; a dot after 52 curves."""
    return LETTERS[index] if index < len(LETTERS) else "·"


def _curve_colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _render_legend(panel: Panel, width: int) -> Text:
    text = Text(" " * _INDENT)
    used = _INDENT
    for index, curve in enumerate(panel.curves):
        entry = f"{curve_letter(index)} {curve.name}"
        if cell_len(entry) > width - _INDENT:
            entry = set_cell_size(entry, width - _INDENT)
        if used > _INDENT and used + cell_len(entry) > width:
            text.append("\n" + " " * _INDENT)
            used = _INDENT
        text.append(entry, style=_curve_colour(index)).append("   ")
        used += cell_len(entry) + 3
    return text


def _to_exponents(curve: Curve) -> Curve:
    """Return the curve of the common logarithms."""
    return Curve(
        curve.name,
        [(x, math.log10(y) if math.isfinite(y) else math.nan) for x, y in curve.points],
        [(x, math.log10(low), math.log10(high)) for x, low, high in curve.band],
    )


def _smooth_strongly(curve: Curve, columns: int) -> Curve:
    """Smooth a curve even if it is only slightly noisy, and drop its band."""
    return replace(smooth(curve, columns, max_swings=_MAX_SWINGS), band=())


class _Canvas:
    """A grid of characters, each with two by four dots, and the axes around it."""

    def __init__(self, bounds: tuple[float, float, float, float], width: int, height: int, *, log: bool) -> None:
        self._x, self._right, self._low, self._high = bounds
        if self._low / 2 == self._high / 2:
            room = max(abs(self._low) / 10, sys.float_info.min) if self._low else 1.0
            self._low = max(self._low - room, -sys.float_info.max)
            self._high = min(self._high + room, sys.float_info.max)
        self._height = height
        values = (compute_log_ticks if log else compute_ticks)(self._low, self._high, height // 2)
        marks = {self._text_row(value): f"{10**value if log else value:.6g}" for value in reversed(values)}
        self._labels = marks
        self._margin = max(len(text) for text in ("step", *marks.values()))
        self.width = max(_MIN_WIDTH, width - _INDENT - self._margin - 2 - _LABEL_MARGIN)
        self._dots: dict[tuple[int, int], int] = {}
        self._styles: dict[tuple[int, int], str] = {}
        self._letters: dict[tuple[int, int], tuple[str, str]] = {}

    def draw(self, curves: Sequence[Curve], *, letters_along: bool) -> None:
        """Draw the bands, then the curves; with several curves also their letters."""
        for index, curve in enumerate(curves):
            self.fill_band(curve, _curve_colour(index))
        paths = [self.trace(curve, _curve_colour(index)) for index, curve in enumerate(curves)]
        if len(paths) > 1:
            for index, path in enumerate(paths):
                self.place_letter(path, index, len(paths), along=letters_along)

    def fill_band(self, curve: Curve, colour: str) -> None:
        """Fill a band with every other dot."""
        ends: dict[int, tuple[float, float]] = {}
        for x, low, high in curve.band:
            if math.isfinite(low) and math.isfinite(high):
                column = self._dot_position((x, low))[0] // 2 * 2  # the other half of a character stays empty
                before = ends.get(column, (low, high))
                ends[column] = min(low, before[0]), max(high, before[1])
        for column, low, high in _interpolate_band(ends):
            _, bottom = self._dot_position((self._x, low))
            _, top = self._dot_position((self._x, high))
            for row in range(top, bottom + 1):
                if (row + column) % 2 == 0 and column % 2 == 0:
                    self._set_dot(column, row, f"dim {colour}")

    def trace(self, curve: Curve, colour: str) -> dict[int, int]:
        """Draw a line through the points; return the last row in each column that it passes."""
        path: dict[int, int] = {}
        for piece in downsample(curve.points, 2 * self.width):
            dots = [self._dot_position(point) for point in piece]
            for (x0, y0), (x1, y1) in pairwise([dots[0], *dots]):
                length = max(abs(x1 - x0), abs(y1 - y0), 1)
                for step in range(length + 1):
                    x, y = x0 + round((x1 - x0) * step / length), y0 + round((y1 - y0) * step / length)
                    self._set_dot(x, y, colour)
                    path[x // 2] = y // 4
        return path

    def place_letter(self, path: dict[int, int], index: int, curves: int, *, along: bool) -> None:
        """Put the letter of a curve after its end, and along it if ``along`` is set."""
        if not path:
            return
        style = _curve_colour(index)
        column, row = max(path.items())
        cell = next((row, x) for x in range(column + 1, column + 3 + curves) if (row, x) not in self._letters)
        self._letters[cell] = (curve_letter(index), style)
        if along:
            for number in range(_LABEL_STRIDE):
                target = self.width * (number + (index + 0.5) / curves) / _LABEL_STRIDE
                column = min(path, key=lambda at: abs(at - target))
                if column < self.width - 1:
                    self._letters.setdefault((path[column], column), (curve_letter(index), style))

    def render_rows(self) -> Iterator[Text]:
        """Yield the rows of the canvas with its y axis, from the top."""
        for row in range(self._height):
            label = self._labels.get(row, "")
            text = Text(f"{' ' * _INDENT}{label:>{self._margin}} {'┤' if label else '│'}")
            cells = [self._cell(row, column) for column in range(self.width + _LABEL_MARGIN)]
            for style, run in groupby(cells, key=lambda cell: cell[1]):
                text.append("".join(char for char, _ in run), style=style)
            text.rstrip()
            yield text

    def render_x_axis(self) -> Iterator[Text]:
        """Yield the x axis: a line with ticks, and a line of numbers."""
        line = ["─"] * self.width
        numbers = [" "] * (self.width + _LABEL_MARGIN)
        free = 0
        for value in self._x_ticks():
            column = self._dot_position((value, self._low))[0] // 2
            text = f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"
            start = max(0, min(column - len(text) // 2, len(numbers) - len(text)))
            if start >= free:
                line[column] = "┬"
                numbers[start : start + len(text)] = text
                free = start + len(text) + 2
        blank = " " * (_INDENT + self._margin + 1)
        yield Text(f"{blank}└{''.join(line)}")
        yield Text(f"{'  step':<{len(blank)}} {''.join(numbers).rstrip()}")

    def _x_ticks(self) -> list[float]:
        ticks = [value for value in compute_ticks(self._x, self._right, self.width // 12) if value == int(value)]
        return ticks if len(ticks) > 1 else sorted({self._x, self._right})

    def _cell(self, row: int, column: int) -> tuple[str, str]:
        if (row, column) in self._letters:
            return self._letters[row, column]
        dots = self._dots.get((row, column), 0)
        return (chr(_BRAILLE + dots), self._styles[row, column]) if dots else (" ", "")

    def _set_dot(self, column: int, row: int, style: str) -> None:
        cell = row // 4, column // 2
        self._dots[cell] = self._dots.get(cell, 0) | _DOTS[column % 2][row % 4]
        self._styles[cell] = style

    def _dot_position(self, point: Point) -> tuple[int, int]:
        """Return the column and the row of the dot at a point."""
        across = (point[0] - self._x) / ((self._right - self._x) or 1.0)
        return round(across * (2 * self.width - 1)), self._scale_y(point[1], 4 * self._height)

    def _text_row(self, value: float) -> int:
        return self._scale_y(value, 4 * self._height) // 4

    def _scale_y(self, value: float, rows: int) -> int:
        # In halves: the distance between the two largest floats overflows.
        share = (value / 2 - self._low / 2) / (self._high / 2 - self._low / 2)
        return round((1 - share) * (rows - 1))


def _interpolate_band(ends: dict[int, tuple[float, float]]) -> Iterator[tuple[int, float, float]]:
    """Yield the ends of a band for every column, interpolated between the known ones."""
    known = sorted(ends.items())
    for (start, (low, high)), (end, (next_low, next_high)) in pairwise(known):
        for column in range(start, end):
            share = (column - start) / (end - start)
            yield column, low + (next_low - low) * share, high + (next_high - high) * share
    for column, (low, high) in known[-1:]:
        yield column, low, high
