"""``trackopt verify``: verify checksums and structure of checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from trackopt.analysis.verify import DAMAGED, SOUND, UNCHECKED, UNLOADABLE, UNREADABLE, FileReport, verify
from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

_EXIT_CODES = {SOUND: 0, DAMAGED: 1, UNREADABLE: 2, UNLOADABLE: 1, UNCHECKED: 2}
_LEVELS = {SOUND: "ok", DAMAGED: "error", UNREADABLE: "error", UNLOADABLE: "error", UNCHECKED: "warning"}
_MAX_PROBLEMS = 20


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(paths: tuple[str, ...], as_json: bool) -> int:
    r"""Verify checksums and structure of checkpoints, and the bounds of every tensor.

    PATH is a file, DIRECTORY@STEP, or a run's directory, whose checkpoints and journal are all checked. For a
    truncated file, prints what can still be recovered.

    \b
    Example:
      trackopt verify runs/digits
      trackopt verify model.pt && rm model.bak.pt

    Exit codes: 0 sound, 1 damaged or not loadable, 2 unreadable or not checked.
    """
    reports = [report for path in paths for report in verify(path)]
    if as_json:
        console.write_json(
            {
                "sound": all(report.status == SOUND for report in reports),
                "files": [report.as_dict() for report in reports],
            }
        )
    else:
        console.show(line for report in reports for line in _render_report(report))
    return max(_EXIT_CODES[report.status] for report in reports)


def _render_report(report: FileReport) -> Iterator[RenderableType]:
    facts = " · ".join(filter(None, (report.format, console.format_size(report.bytes) if report.bytes else "")))
    yield console.render_finding(
        _LEVELS[report.status], f"{console.sanitize(report.path)}: {report.status}{facts and f'   {facts}'}"
    )
    for problem in report.problems[:_MAX_PROBLEMS]:
        yield console.render_indented(problem)
    if len(report.problems) > _MAX_PROBLEMS:
        yield console.render_indented(f"and {len(report.problems) - _MAX_PROBLEMS:,} more problems")
    if report.salvageable:
        yield console.render_indented(report.salvageable)
