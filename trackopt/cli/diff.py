"""``trackopt diff``: what changed between two checkpoints, as a story first."""

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

_TOP = 10
_LONG = 256 << 20  # bytes from which a bar is shown
_DIFFER = 1


def _renames(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [(old, new) for old, sign, new in (text.partition("=") for text in given) if sign and old]
    if len(pairs) < len(given):
        raise click.BadParameter("it is OLD=NEW, as in --map encoder=backbone")
    return dict(pairs)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--resume", is_flag=True, help="Say whether B, loaded into A's training, continues the same run.")
@click.option("--stat", is_flag=True, help="One line for each module and each kind of buffer.")
@click.option("--tensors", is_flag=True, help="List every change, not just the largest.")
@click.option("--top", default=_TOP, metavar="N", show_default=True, type=click.IntRange(0), help="Rows of each list.")
@click.option("--only", multiple=True, metavar="GLOB", help="Compare these paths or parameters alone, as 'head.*'.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave these out.")
@click.option(
    "--map",
    "renamed",
    multiple=True,
    metavar="OLD=NEW",
    callback=_renames,
    help="Parameters of A, or the beginnings of their names, that B calls otherwise.",
)
@click.option("--atol", default=0.0, metavar="X", type=click.FloatRange(0), help="Call |a - b| up to this equal …")
@click.option(
    "--rtol", default=0.0, metavar="X", type=click.FloatRange(0), help="… plus this times the larger of |a|, |b|."
)
@click.option("--fast", is_flag=True, help="Take records with the same size and CRC-32 as equal, unread.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(a: str, b: str, resume: bool, stat: bool, tensors: bool, top: int, as_json: bool, **terms: Any) -> int:
    r"""What changed between two checkpoints.

    A and B are files, runs' directories (their newest checkpoints) or DIRECTORY@STEP, of any formats. Every
    value is compared, bit for bit: parameters by name, whatever wrappers put in front, optimizer state by its
    parameter. What only says which run wrote a file, and when, is no difference.

    \b
    Example:
      trackopt diff runs/digits@400 runs/digits@450
      trackopt diff runs/digits@450 elsewhere.pt --resume
      trackopt diff before.pt after.safetensors --only 'head.*' --tensors

    Exit codes: 0 nothing differs, 1 something does, 2 trouble; with --resume: 0 the same run, 1 not, 2 trouble.
    """
    if resume + stat + tensors > 1:
        raise click.UsageError("--resume, --stat and --tensors are three screens: choose one")
    if resume and (terms["only"] or terms["ignore"]):
        raise click.UsageError("--resume looks at the whole checkpoints: leave out --only and --ignore")
    with (
        locations.open(a) as one,
        locations.open(b) as other,
        console.progress("comparing", shown=one.bytes + other.bytes > _LONG) as progress,
    ):
        found = diff.diff(one, other, progress=progress, **terms)
    if as_json:
        console.write_json(found.as_dict())
    else:
        chosen = (_stat if stat else _resumed if resume else _everything if tensors else _screen)(found, top)
        console.show(_framed(found, chosen))
    if resume and found.resume is not None:
        return 0 if found.resume.continues else _DIFFER
    return 0 if found.equal else _DIFFER


def _framed(found: Difference, inside: Iterator[RenderableType]) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(diff_summary.headline(found), style="bold")
    yield ""
    yield from inside
    yield from diff_summary.notes(found)
    if found.ignored:
        names = ", ".join(path.removeprefix("trackopt.") for path in found.ignored)
        told = f"not counted, since it only says who wrote the file: {names}"
        yield Text("  " + console.wrap_fields([told], indent=4, first=2), style="dim")


def _screen(found: Difference, top: int, *, everything: bool = False) -> Iterator[RenderableType]:
    if found.equal:
        yield _equal(found)
        return
    told = list(diff_summary.lines(found))
    yield from told
    if told:
        yield ""
    if everything:
        yield from diff_table.every(found)
        yield diff_table.count(found)
    else:
        yield from diff_table.largest(found, top)
        yield diff_table.count(found, diff_table.consequences(found), hint="--tensors shows all")


def _everything(found: Difference, top: int) -> Iterator[RenderableType]:
    return _screen(found, top, everything=True)


def _resumed(found: Difference, _: int) -> Iterator[RenderableType]:
    told = list(diff_summary.lines(found))
    yield from told
    if told:
        yield ""
    if found.resume is not None:
        yield from diff_summary.verdict(found.resume)


def _stat(found: Difference, _: int) -> Iterator[RenderableType]:
    if found.equal:
        yield _equal(found)
        return
    yield from diff_table.modules(found)
    yield diff_table.count(found)


def _equal(found: Difference) -> RenderableType:
    tally = found.tally
    same = tally.tensors["same"]
    how = ", bit for bit" if not (tally.within_tolerance or tally.skipped_by_checksum) else ""
    text = f"the same{how}: {same:,} tensors and {found.same - same:,} other values"
    if tally.within_tolerance:
        text += f"; {tally.within_tolerance:,} of them differ by less than the tolerance"
    if tally.skipped_by_checksum:
        text += f"; {tally.skipped_by_checksum:,} of the tensors by size and checksum alone"
    return console.finding("ok", text)
