"""``trackopt verify``: whether files are what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from trackopt.analysis.verify import DAMAGED, SOUND, UNREADABLE, FileReport, verify
from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

_CODES = {SOUND: 0, DAMAGED: 1, UNREADABLE: 2}
_LEVELS = {SOUND: "ok", DAMAGED: "error", UNREADABLE: "error"}
_SHOWN = 20


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(paths: tuple[str, ...], as_json: bool) -> int:
    r"""Whether files are what was written: structure, checksums and bounds of every tensor.

    PATH is a file, DIRECTORY@STEP, or a run's directory: then every checkpoint in it and its journal are
    checked. Of a file that was cut short it says what can still be saved.

    \b
    Example:
      trackopt verify runs/digits
      trackopt verify model.pt && rm model.bak.pt

    Exit codes: 0 sound, 1 damaged, 2 unreadable.
    """
    found = [one for path in paths for one in verify(path)]
    if as_json:
        console.write_json({"sound": all(one.status == SOUND for one in found), "files": [o.as_dict() for o in found]})
    else:
        console.show(line for one in found for line in _lines(one))
    return max(_CODES[one.status] for one in found)


def _lines(one: FileReport) -> Iterator[RenderableType]:
    about = " · ".join(filter(None, (one.format, console.size(one.bytes) if one.bytes else "")))
    yield console.finding(_LEVELS[one.status], f"{console.sanitize(one.path)}: {one.status}{about and f'   {about}'}")
    for problem in one.problems[:_SHOWN]:
        yield console.indented(problem)
    if len(one.problems) > _SHOWN:
        yield console.indented(f"and {len(one.problems) - _SHOWN:,} more problems")
    if one.salvageable:
        yield console.indented(one.salvageable)
