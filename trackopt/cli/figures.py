"""Draw panels on the screen or into files, with the options that the drawing commands share."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.text import Text

    from trackopt.plotting.figure import Panel

_HEIGHTS = 12, 7
_MIN_HEIGHT = 4
_RESERVED_ROWS = 5  # title, legend, axis and a blank line
_FILE = click.Path(path_type=Path, dir_okay=False)


def picture_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options ``--png`` and ``--svg`` to a command."""
    function = click.option("--svg", type=_FILE, metavar="FILE", help="Write the curves as an SVG.")(function)
    return click.option("--png", type=_FILE, metavar="FILE", help="Write the curves as a PNG.")(function)


def write_pictures(panels: Sequence[Panel], *, png: Path | None, svg: Path | None, title: str) -> None:
    """Write the panels to the given files and report each on stderr."""
    kinds: dict[Literal["png", "svg"], Path | None] = {"png": png, "svg": svg}
    for kind, file in kinds.items():
        if file is not None:
            from trackopt.plotting.matplotlib import save

            save([_sanitize_panel(panel) for panel in panels], file, kind, title=title)
            click.echo(f"wrote {console.sanitize(file)}", err=True)


def attach_picture(panels: Sequence[Panel], directories: Sequence[Path], *, name: str, title: str) -> None:
    """Attach the curves as ``NAME.png`` to each run's MLflow run and report each on stderr."""
    from trackopt.plotting.matplotlib import save
    from trackopt.recorder.sinks.mlflow_figures import FOLDER, log_figure

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.png"
        save([_sanitize_panel(panel) for panel in panels], file, "png", title=title)
        for directory in directories:
            log_figure(directory, file)
            click.echo(f"attached {FOLDER}/{file.name} to {console.sanitize(directory.name)} in MLflow", err=True)


def render(panels: Iterable[tuple[Panel, int]], *, legend: bool = True) -> Iterator[Text]:
    """Render panels for the screen, each with its number of rows."""
    from trackopt.plotting.terminal import render

    coloured = _has_colours()
    for panel, height in panels:
        yield render(_sanitize_panel(panel), width=console.width(), height=height, coloured=coloured, legend=legend)


def fit_panels(panels: Sequence[Panel], rows: int | None = None) -> list[tuple[Panel, int]]:
    """Choose the height of each panel; with few rows, shrink the panels and drop those that do not fit."""
    if rows is not None:
        panels = panels[: max(1, rows // (_RESERVED_ROWS + _MIN_HEIGHT))]
    wanted = [_HEIGHTS[min(number, 1)] for number in range(len(panels))]
    spare = 0 if rows is None else max(0, sum(wanted) + _RESERVED_ROWS * len(panels) - rows)
    heights = [max(_MIN_HEIGHT, height - math.ceil(spare * height / sum(wanted))) for height in wanted]
    return list(zip(panels, heights, strict=True))


def _sanitize_panel(panel: Panel) -> Panel:
    """Downsample a panel and sanitize its names, which come from files."""
    panel = panel.downsample()
    curves = tuple(replace(curve, name=console.sanitize(curve.name)) for curve in panel.curves)
    return replace(panel, title=console.sanitize(panel.title), curves=curves)


def _has_colours() -> bool:
    from rich.console import Console

    screen = Console(file=sys.stdout)
    return screen.color_system is not None and not screen.no_color
