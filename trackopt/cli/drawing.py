"""What the commands that draw have in common: the options for pictures, and panels on the screen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from trackopt.cli import screen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.text import Text

    from trackopt.figure import Panel

_FILE = click.Path(path_type=Path, dir_okay=False)


def picture_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--png`` and ``--svg``."""
    function = click.option("--svg", type=_FILE, metavar="FILE", help="Write the curves as an SVG.")(function)
    return click.option("--png", type=_FILE, metavar="FILE", help="Write the curves as a PNG.")(function)


def write_pictures(panels: Sequence[Panel], *, png: Path | None, svg: Path | None, title: str) -> None:
    """Write the panels to those files that were asked for, and say so on stderr."""
    if png is not None:
        write_picture(panels, png, "png", title=title)
    if svg is not None:
        write_picture(panels, svg, "svg", title=title)


def write_picture(panels: Sequence[Panel], file: Path, kind: Literal["png", "svg"], *, title: str) -> None:
    """Write one picture, and say so on stderr."""
    from trackopt.figure.paper import save

    save(panels, file, kind, title=title)
    click.echo(f"wrote {screen.clean(file)}", err=True)


def drawn(panels: Sequence[Panel], heights: Sequence[int], *, legend: bool = True) -> Iterator[Text]:
    """The panels as they stand on the screen, one below the other."""
    from trackopt.figure.terminal import draw

    coloured = _coloured()
    for panel, height in zip(panels, heights, strict=True):
        yield draw(panel, width=screen.width(), height=height, coloured=coloured, legend=legend)


def _coloured() -> bool:
    from rich.console import Console

    console = Console(file=sys.stdout)
    return console.color_system is not None and not console.no_color
