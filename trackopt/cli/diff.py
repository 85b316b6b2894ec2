"""``trackopt diff``: show what changed between two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from trackopt import locations
from trackopt.analysis import diff
from trackopt.cli import console, diff_summary, diff_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from trackopt.analysis.diff import Difference

_DEFAULT_TOP = 10
_PROGRESS_BAR_MIN_BYTES = 256 << 20
_EXIT_DIFFERENT = 1


def _parse_renames(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [(old, new) for old, sign, new in (text.partition("=") for text in given) if sign and old]
    if len(pairs) < len(given):
        raise click.BadParameter("expected OLD=NEW, such as encoder=backbone")
    return dict(pairs)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--resume", is_flag=True, help="Check whether B, loaded into A's training, continues the same run.")
@click.option("--stat", is_flag=True, help="Print one line for each module and each kind of buffer.")
@click.option("--tensors", is_flag=True, help="List every change, not only the largest.")
@click.option(
    "--top",
    default=_DEFAULT_TOP,
    metavar="N",
    show_default=True,
    type=click.IntRange(0),
    help="Limit the rows of each list.",
)
@click.option("--only", multiple=True, metavar="GLOB", help="Compare only these paths or parameters, as 'head.*'.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Skip these paths or parameters.")
@click.option(
    "--map",
    "renamed",
    multiple=True,
    metavar="OLD=NEW",
    callback=_parse_renames,
    help="Match names of A that start with OLD with names of B that start with NEW.",
)
@click.option("--atol", default=0.0, metavar="X", type=click.FloatRange(0), help="Treat |a - b| up to this as equal.")
@click.option(
    "--rtol",
    default=0.0,
    metavar="X",
    type=click.FloatRange(0),
    help="Add this times the larger of |a|, |b| to --atol.",
)
@click.option(
    "--fast", is_flag=True, help="Treat records with the same size and CRC-32 as equal, without reading them."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(a: str, b: str, resume: bool, stat: bool, tensors: bool, top: int, as_json: bool, **options: Any) -> int:
    r"""Show what changed between two checkpoints.

    A and B are files, runs' directories (their newest checkpoints) or DIRECTORY@STEP, of any format. Every value
    is compared, bit for bit: parameters by name, without the prefixes of wrappers; optimizer state by parameter.
    Values that only identify the run and the time of writing do not count.

    \b
    Example:
      trackopt diff runs/digits@400 runs/digits@450
      trackopt diff runs/digits@450 elsewhere.pt --resume
      trackopt diff before.pt after.safetensors --only 'head.*' --tensors

    Exit codes: 0 no difference, 1 a difference, 2 trouble; with --resume: 0 the same run, 1 another run, 2 trouble.
    """
    if resume + stat + tensors > 1:
        raise click.UsageError("--resume, --stat and --tensors exclude each other; choose one")
    if resume and (options["only"] or options["ignore"]):
        raise click.UsageError("--resume compares whole checkpoints; omit --only and --ignore")
    with (
        locations.open(a) as before,
        locations.open(b) as after,
        console.progress_bar("comparing", shown=before.bytes + after.bytes > _PROGRESS_BAR_MIN_BYTES) as progress,
    ):
        difference = diff.diff(before, after, progress=progress, **options)
    if as_json:
        console.write_json(difference.as_dict())
    else:
        render = (
            _render_modules if stat else _render_resume if resume else _render_everything if tensors else _render_top
        )
        console.show(_render_framed(difference, render(difference, top)))
    if resume and difference.resume is not None:
        return 0 if difference.resume.continues else _EXIT_DIFFERENT
    return 0 if difference.equal else _EXIT_DIFFERENT


def _render_framed(difference: Difference, body: Iterator[RenderableType]) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(diff_summary.format_headline(difference), style="bold")
    yield ""
    yield from body
    yield from diff_summary.render_notes(difference)
    if difference.ignored:
        names = ", ".join(path.removeprefix("trackopt.") for path in difference.ignored)
        note = f"not counted, since it only identifies the run: {names}"
        yield Text("  " + console.wrap_fields([note], indent=4, first=2), style="dim")


def _render_top(difference: Difference, top: int) -> Iterator[RenderableType]:
    if difference.equal:
        yield _render_equal(difference)
        return
    yield from _render_training(difference)
    yield from diff_table.render_largest(difference, top)
    yield diff_table.render_count(difference, diff_table.find_step_changes(difference), hint="--tensors shows all")


def _render_everything(difference: Difference, _: int) -> Iterator[RenderableType]:
    if difference.equal:
        yield _render_equal(difference)
        return
    yield from _render_training(difference)
    yield from diff_table.render_all(difference)
    yield diff_table.render_count(difference)


def _render_training(difference: Difference) -> Iterator[RenderableType]:
    rows = list(diff_summary.render_training(difference))
    yield from rows
    if rows:
        yield ""


def _render_resume(difference: Difference, _: int) -> Iterator[RenderableType]:
    yield from _render_training(difference)
    if difference.resume is not None:
        yield from diff_summary.render_continuation(difference.resume)


def _render_modules(difference: Difference, _: int) -> Iterator[RenderableType]:
    if difference.equal:
        yield _render_equal(difference)
        return
    yield from diff_table.render_modules(difference)
    yield diff_table.render_count(difference)


def _render_equal(difference: Difference) -> RenderableType:
    tally = difference.totals
    same = tally.tensors["same"]
    precision = ", bit for bit" if not (tally.within_tolerance or tally.skipped_by_checksum) else ""
    text = f"the same{precision}: {same:,} tensors and {difference.same - same:,} other values"
    if tally.within_tolerance:
        text += f"; {tally.within_tolerance:,} of them differ by less than the tolerance"
    if tally.skipped_by_checksum:
        text += f"; {tally.skipped_by_checksum:,} of the tensors by size and checksum alone"
    return console.render_finding("ok", text)
