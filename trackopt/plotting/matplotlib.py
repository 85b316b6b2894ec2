"""Draw panels as a PNG or SVG picture with matplotlib, without a window."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal

from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from trackopt.errors import UsageError
from trackopt.plotting.figure import Curve, Panel, smooth, split_at_gaps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_WIDTH_IN = 9.0
_HEIGHTS_IN = 3.4, 2.2  # of the first panel and the others
_DPI = 150
_BAND_ALPHA = 0.2
_MAX_VALUE = 1e300  # beyond it matplotlib's own arithmetic overflows
_SMOOTHED_COLUMNS = 100  # medians that replace a noisy curve, if there are several curves
_RAW_ALPHA = 0.3  # the noisy curve behind its medians
_LEGEND_CHARACTERS = 130  # in one line of the legend
_CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Droid Sans Fallback"),
)


def save(panels: Sequence[Panel], file: Path, kind: Literal["png", "svg"], *, title: str) -> None:
    """Write the panels, one below the other.

    Args:
        panels: Downsampled panels.
        file: The file to write.
        kind: The file format.
        title: The title above all panels.

    Raises:
        UsageError: The file cannot be written.
    """
    with rc_context({"font.family": _font_families()}):
        _write(panels, file, kind, title)


def _font_families() -> list[str]:
    """Return the default font, followed by an installed font with Chinese characters if there is one."""
    installed = {font.name for font in fontManager.ttflist}
    return [*rcParams["font.family"], *[name for name in _CHINESE_FONTS if name in installed][:1]]


def _write(panels: Sequence[Panel], file: Path, kind: Literal["png", "svg"], title: str) -> None:
    heights = [_HEIGHTS_IN[min(number, 1)] for number in range(len(panels))]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for panel, axes in zip(panels, grid[:, 0], strict=True):
        _draw(panel, axes)
    grid[-1, 0].set_xlabel("step")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # characters that no font has become boxes
            # Without a date the same panels are the same bytes.
            figure.savefig(file, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else {})
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); choose another path") from error


def _draw(panel: Panel, axes: Axes) -> None:
    several = len(panel.curves) > 1
    for index, curve in enumerate(panel.curves):
        colour = f"C{index}"
        shown = smooth(curve, _SMOOTHED_COLUMNS) if several else curve
        if shown is not curve:
            _draw_line(curve, axes, colour, alpha=_RAW_ALPHA)
        _draw_line(shown, axes, colour, alpha=1.0)
        if curve.band:
            xs, *edges = zip(*curve.band, strict=True)
            lows, highs = ([min(max(y, -_MAX_VALUE), _MAX_VALUE) for y in edge] for edge in edges)
            axes.fill_between(xs, lows, highs, color=colour, alpha=_BAND_ALPHA, linewidth=0)
        axes.plot([], [], color=colour, label=_escape(curve.name))
    if panel.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if several:
        _draw_legend(panel, axes)
    else:
        axes.set_title(_escape(panel.title), fontsize="small", loc="left")


def _draw_line(curve: Curve, axes: Axes, colour: str, *, alpha: float) -> None:
    for piece in split_at_gaps([(x, y if abs(y) < _MAX_VALUE else math.nan) for x, y in curve.points]):
        marker = "." if len(piece) == 1 else ""
        axes.plot(*zip(*piece, strict=True), color=colour, linewidth=1.1, marker=marker, alpha=alpha)


def _draw_legend(panel: Panel, axes: Axes) -> None:
    """Put the legend above the axes, where it hides no curve, with the panel's title."""
    longest = max(len(curve.name) for curve in panel.curves)
    axes.legend(
        title=_escape(panel.title),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
        alignment="left",
        fontsize="small",
        title_fontsize="small",
        frameon=False,
        ncols=max(1, min(len(panel.curves), _LEGEND_CHARACTERS // (longest + 5))),
    )


def _escape(text: str) -> str:
    r"""Escape what matplotlib takes for mathematics (``$``) or for a label to skip (a leading ``_``)."""
    return text.replace("$", r"\$").removeprefix("_")
