"""Panels as a picture, PNG or SVG, drawn by matplotlib without a window."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal

from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from trackopt.errors import UsageError
from trackopt.plotting.figure import Curve, Panel, pieces, smooth

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_WIDTH = 9.0  # inches
_HEIGHTS = 3.4, 2.2  # of the first panel and the others
_RESOLUTION = 150  # dots per inch
_BAND = 0.2  # opacity
_LARGEST = 1e300  # beyond it matplotlib's own arithmetic overflows
_SMOOTHED_ALPHA = 100  # columns of the medians that noisy curves are shown by, if there are several
_RAW_ALPHA = 0.3  # opacity of the noise itself
_LINE = 130  # letters of a line of the legend
_CHINESE = (
    *("Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Droid Sans Fallback"),
)


def save(panels: Sequence[Panel], file: Path, kind: Literal["png", "svg"], *, title: str) -> None:
    """Write the panels, one below the other.

    Args:
        panels: What to draw; lean ones.
        file: Where to.
        kind: The format.
        title: Stands above all.

    Raises:
        UsageError: The file cannot be written.
    """
    with rc_context({"font.family": _families()}):
        _save(panels, file, kind, title)


def _families() -> list[str]:
    """The usual font; for the letters that it lacks one with Chinese, where one is installed."""
    there = {font.name for font in fontManager.ttflist}
    return [*rcParams["font.family"], *[name for name in _CHINESE if name in there][:1]]


def _save(panels: Sequence[Panel], file: Path, kind: Literal["png", "svg"], title: str) -> None:
    heights = [_HEIGHTS[min(number, 1)] for number in range(len(panels))]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for panel, axes in zip(panels, grid[:, 0], strict=True):
        _draw(panel, axes)
    grid[-1, 0].set_xlabel("step")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in letters that no font has becomes boxes
            # Without a date the same panels are the same bytes.
            figure.savefig(file, format=kind, dpi=_RESOLUTION, metadata={"Date": None} if kind == "svg" else {})
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); choose another place") from error


def _draw(panel: Panel, axes: Axes) -> None:
    several = len(panel.curves) > 1
    for index, curve in enumerate(panel.curves):
        colour = f"C{index}"
        shown = smooth(curve, _SMOOTHED_ALPHA) if several else curve
        if shown is not curve:
            _line(curve, axes, colour, alpha=_RAW_ALPHA)
        _line(shown, axes, colour, alpha=1.0)
        if curve.band:
            xs, *edges = zip(*curve.band, strict=True)
            lows, highs = ([min(max(y, -_LARGEST), _LARGEST) for y in edge] for edge in edges)
            axes.fill_between(xs, lows, highs, color=colour, alpha=_BAND, linewidth=0)
        axes.plot([], [], color=colour, label=_plain(curve.name))
    if panel.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if several:
        _legend(panel, axes)
    else:
        axes.set_title(_plain(panel.title), fontsize="small", loc="left")


def _line(curve: Curve, axes: Axes, colour: str, *, alpha: float) -> None:
    for piece in pieces([(x, y if abs(y) < _LARGEST else math.nan) for x, y in curve.points]):
        marker = "." if len(piece) == 1 else ""
        axes.plot(*zip(*piece, strict=True), color=colour, linewidth=1.1, marker=marker, alpha=alpha)


def _legend(panel: Panel, axes: Axes) -> None:
    """Above the axes, where it hides nothing; its title is the panel's."""
    longest = max(len(curve.name) for curve in panel.curves)
    axes.legend(
        title=_plain(panel.title),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
        alignment="left",
        fontsize="small",
        title_fontsize="small",
        frameon=False,
        ncols=max(1, min(len(panel.curves), _LINE // (longest + 5))),
    )


def _plain(text: str) -> str:
    r"""A text in which matplotlib sees neither mathematics nor a label to leave out."""
    return text.replace("$", r"\$").removeprefix("_")
