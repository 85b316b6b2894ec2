"""A panel on a terminal: lines of braille dots, two by four to a character, between axes with round numbers."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from trackopt.plotting.figure import LETTERS, Curve, Panel, Point, downsample, log_ticks, smooth, ticks

if TYPE_CHECKING:
    from collections.abc import Iterator

_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a character, by column and row
_MAX_LETTERED = 5  # curves, from which on they are drawn without bands, each as the median of
_STRIDE = 4  # columns
_FEW = 2  # swings
_LABEL_STRIDE = 3  # how often a curve's letter stands on it
_LABEL_MARGIN = 4  # letters that fit behind the canvas
_NARROWEST = 10
_INDENT = 2


def draw(panel: Panel, *, width: int, height: int, coloured: bool, legend: bool = True) -> Text:
    """A panel as lines of text.

    Of several curves each has a letter, at its end; where colours do not tell them apart, along it, too. Noisy ones
    would cover each other, so of several the line is the median of each column, in a band from end to end; of many, the
    median of some columns, without a band.

    Args:
        panel: What to draw.
        width: Columns in all.
        height: Rows of the canvas; the title, the legend and the x axis come on top.
        coloured: Whether colours can be seen.
        legend: Whether to say whose letter is which; else the caller does.

    Example:
        >>> print(draw(Panel("lr", (Curve("", [(1, 0.0), (2, 1.0)]),)), width=24, height=3, coloured=False))
          lr
             1 ┤        ⣀⠤⠒⠉
               │    ⣀⠤⠒⠉
             0 ┤⣀⠤⠒⠉
               └┬──────────┬
          step  1          2
    """
    lines = [Text(f"{' ' * _INDENT}{panel.title}", style="bold")]
    if panel.log:
        panel = replace(panel, curves=tuple(map(_exponents, panel.curves)))
    crowded = len(panel.curves) >= _MAX_LETTERED
    if crowded:
        panel = replace(panel, curves=tuple(_middle(curve, width // _STRIDE) for curve in panel.curves))
    bounds = panel.bounds()
    if bounds is None:
        return Text("\n").join([*lines, Text(f"{' ' * _INDENT}nothing to draw yet")])
    if legend and len(panel.curves) > 1:
        lines.append(_legend(panel, width))
    canvas = _Canvas(bounds, width, height, log=panel.log)
    several = len(panel.curves) > 1
    curves = [smooth(curve, canvas.width) if several and not crowded else curve for curve in panel.curves]
    for index, curve in enumerate(curves):
        canvas.fill_band(curve, _colour(index))
    paths = [canvas.trace(curve, _colour(index)) for index, curve in enumerate(curves)]
    if several:
        for index, path in enumerate(paths):
            canvas.letter(path, index, len(paths), position=not coloured or len(paths) > len(_COLOURS))
    return Text("\n").join([*lines, *canvas.rows(), *canvas.axis()])


def letter(index: int) -> str:
    """The letter of the n-th curve; there are 52, then dots."""
    return LETTERS[index] if index < len(LETTERS) else "·"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _legend(panel: Panel, width: int) -> Text:
    text = Text(" " * _INDENT)
    used = _INDENT
    for index, curve in enumerate(panel.curves):
        entry = f"{letter(index)} {curve.name}"
        if cell_len(entry) > width - _INDENT:
            entry = set_cell_size(entry, width - _INDENT)
        if used > _INDENT and used + cell_len(entry) > width:
            text.append("\n" + " " * _INDENT)
            used = _INDENT
        text.append(entry, style=_colour(index)).append("   ")
        used += cell_len(entry) + 3
    return text


def _exponents(curve: Curve) -> Curve:
    """A curve of the powers of ten that its values are."""
    return Curve(
        curve.name,
        [(x, math.log10(y) if math.isfinite(y) else math.nan) for x, y in curve.points],
        [(x, math.log10(low), math.log10(high)) for x, low, high in curve.band],
    )


def _middle(curve: Curve, columns: int) -> Curve:
    """The median of each column, if it swings at all, and nothing of its band."""
    return replace(smooth(curve, columns, swings=_FEW), band=())


class _Canvas:
    """Characters, each of which holds two by four dots, and the axes around them."""

    def __init__(self, bounds: tuple[float, float, float, float], width: int, height: int, *, log: bool) -> None:
        self._x, self._right, self._low, self._high = bounds
        if self._low / 2 == self._high / 2:
            room = max(abs(self._low) / 10, sys.float_info.min) if self._low else 1.0
            self._low = max(self._low - room, -sys.float_info.max)
            self._high = min(self._high + room, sys.float_info.max)
        self._height = height
        values = (log_ticks if log else ticks)(self._low, self._high, height // 2)
        marks = {self._row(value): f"{10**value if log else value:.6g}" for value in reversed(values)}
        self._labels = marks
        self._margin = max(len(text) for text in ("step", *marks.values()))
        self.width = max(_NARROWEST, width - _INDENT - self._margin - 2 - _LABEL_MARGIN)
        self._dots: dict[tuple[int, int], int] = {}
        self._styles: dict[tuple[int, int], str] = {}
        self._letters: dict[tuple[int, int], tuple[str, str]] = {}

    def fill_band(self, curve: Curve, colour: str) -> None:
        """Fill a band, with every other dot."""
        ends: dict[int, tuple[float, float]] = {}
        for x, low, high in curve.band:
            if math.isfinite(low) and math.isfinite(high):
                column = self._dot((x, low))[0] // 2 * 2  # the other half of a character stays empty
                before = ends.get(column, (low, high))
                ends[column] = min(low, before[0]), max(high, before[1])
        for column, low, high in _between(ends):
            _, bottom = self._dot((self._x, low))
            _, top = self._dot((self._x, high))
            for row in range(top, bottom + 1):
                if (row + column) % 2 == 0 and column % 2 == 0:
                    self._set(column, row, f"dim {colour}")

    def trace(self, curve: Curve, colour: str) -> dict[int, int]:
        """Draw a line through the points; the row that it is left in, for each column that it passes."""
        path: dict[int, int] = {}
        for piece in downsample(curve.points, 2 * self.width):
            dots = [self._dot(point) for point in piece]
            for (x0, y0), (x1, y1) in pairwise([dots[0], *dots]):
                length = max(abs(x1 - x0), abs(y1 - y0), 1)
                for step in range(length + 1):
                    x, y = x0 + round((x1 - x0) * step / length), y0 + round((y1 - y0) * step / length)
                    self._set(x, y, colour)
                    path[x // 2] = y // 4
        return path

    def letter(self, path: dict[int, int], index: int, other_curves: int, *, position: bool) -> None:
        """Put the letter of a curve behind its end, and along it where that is wanted."""
        if not path:
            return
        style = _colour(index)
        column, row = max(path.items())
        place = next((row, x) for x in range(column + 1, column + 3 + other_curves) if (row, x) not in self._letters)
        self._letters[place] = (letter(index), style)
        if position:
            for number in range(_LABEL_STRIDE):
                wanted = self.width * (number + (index + 0.5) / other_curves) / _LABEL_STRIDE
                column = min(path, key=lambda at: abs(at - wanted))
                if column < self.width - 1:
                    self._letters.setdefault((path[column], column), (letter(index), style))

    def rows(self) -> Iterator[Text]:
        """The canvas with its y axis, from the top."""
        for row in range(self._height):
            label = self._labels.get(row, "")
            text = Text(f"{' ' * _INDENT}{label:>{self._margin}} {'┤' if label else '│'}")
            cells = [self._shown(row, column) for column in range(self.width + _LABEL_MARGIN)]
            for style, run in groupby(cells, key=lambda cell: cell[1]):
                text.append("".join(char for char, _ in run), style=style)
            text.rstrip()
            yield text

    def axis(self) -> Iterator[Text]:
        """The x axis: a line with ticks, and their numbers."""
        line = ["─"] * self.width
        numbers = [" "] * (self.width + _LABEL_MARGIN)
        free = 0
        for value in self._steps():
            column = self._dot((value, self._low))[0] // 2
            text = f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"
            start = max(0, min(column - len(text) // 2, len(numbers) - len(text)))
            if start >= free:
                line[column] = "┬"
                numbers[start : start + len(text)] = text
                free = start + len(text) + 2
        blank = " " * (_INDENT + self._margin + 1)
        yield Text(f"{blank}└{''.join(line)}")
        yield Text(f"{'  step':<{len(blank)}} {''.join(numbers).rstrip()}")

    def _steps(self) -> list[float]:
        found = [value for value in ticks(self._x, self._right, self.width // 12) if value == int(value)]
        return found if len(found) > 1 else sorted({self._x, self._right})

    def _shown(self, row: int, column: int) -> tuple[str, str]:
        if (row, column) in self._letters:
            return self._letters[row, column]
        dots = self._dots.get((row, column), 0)
        return (chr(_BRAILLE + dots), self._styles[row, column]) if dots else (" ", "")

    def _set(self, column: int, row: int, style: str) -> None:
        cell = row // 4, column // 2
        self._dots[cell] = self._dots.get(cell, 0) | _DOTS[column % 2][row % 4]
        self._styles[cell] = style

    def _dot(self, point: Point) -> tuple[int, int]:
        """The column and the row of the dot at a point."""
        across = (point[0] - self._x) / ((self._right - self._x) or 1.0)
        return round(across * (2 * self.width - 1)), self._down(point[1], 4 * self._height)

    def _row(self, value: float) -> int:
        return self._down(value, 4 * self._height) // 4

    def _down(self, value: float, rows: int) -> int:
        # In halves: the distance of the two largest floats is no float.
        share = (value / 2 - self._low / 2) / (self._high / 2 - self._low / 2)
        return round((1 - share) * (rows - 1))


def _between(ends: dict[int, tuple[float, float]]) -> Iterator[tuple[int, float, float]]:
    """The ends of a band in every column, those between two known ones too."""
    known = sorted(ends.items())
    for (start, (low, high)), (end, (next_low, next_high)) in pairwise(known):
        for column in range(start, end):
            share = (column - start) / (end - start)
            yield column, low + (next_low - low) * share, high + (next_high - high) * share
    for column, (low, high) in known[-1:]:
        yield column, low, high
