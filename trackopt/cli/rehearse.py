"""``trackopt rehearse``: does this training command resume exactly?"""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from trackopt.cli import console
from trackopt.rehearsal.rehearse import KILLS, rehearse
from trackopt.rehearsal.training_command import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.rehearsal.diagnosis import Diagnosis
    from trackopt.rehearsal.divergence import Divergence
    from trackopt.rehearsal.rehearse import Rehearsal, RunFacts, Tell

_FEW = 8
_NOT_EXACT = 1


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--kills",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"How often to kill it, at random steps.  [default: {KILLS}]",
)
@click.option(
    "--at", type=click.IntRange(min=1), multiple=True, metavar="STEP", help="Kill it after this step instead."
)
@click.option("--seed", type=int, default=0, metavar="N", help="Of the random steps.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(kills: int | None, at: tuple[int, ...], seed: int, as_json: bool, command: tuple[str, ...]) -> int:
    r"""Prove that a training resumes exactly: run it, run it again under SIGKILL, and compare bit for bit.

    COMMAND is the training as you would start it here; it calls trackopt.wrap(). It trains to its end twice, and a
    third time if the two differ. Its runs go to a scratch directory (below TMPDIR), which is kept if something is
    wrong, and to no MLflow or TensorBoard; whatever else it writes, it writes as always. --at may be repeated.

    \b
    Example:
      trackopt rehearse -- python train.py --epochs 2
      trackopt rehearse --at 100 --at 150 -- python train.py

    Exit codes: 0 exact, 1 not exact, 2 trouble: the command fails, or makes no run.
    """
    if kills is not None and at:
        raise click.UsageError("--kills and --at exclude each other")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the training would be left behind
    try:
        with _progress() as tell:
            found = rehearse(command, kills=kills or KILLS, at=at, seed=seed, tell=tell)
    except CommandError as error:
        for line in error.output_tail:
            click.echo(f"  {console.sanitize(line)}", err=True)
        raise
    if as_json:
        console.write_json(found.as_dict())
    else:
        console.show(_screen(found))
    return 0 if found.exact else _NOT_EXACT


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[steps]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, steps="")

        def tell(what: str, done: int, total: int | None) -> None:
            steps = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
            bar.update(task, description=what, completed=done, total=total, steps=steps)

        yield tell


def _screen(found: Rehearsal) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(f"rehearsed  {console.sanitize(shlex.join(found.command))}", style="bold")
    steps = sum(run.steps for run in found.runs)
    runs = f"{len(found.runs)} runs, " if len(found.runs) > 1 else ""
    yield _line([f"uninterrupted   {runs}{steps:,} steps", f"{found.seconds[0]:.1f} s"])
    if found.kills:
        yield _line([_kills(found), f"{found.seconds[1]:.1f} s"])
    yield ""
    if found.verdict is None:
        yield console.finding("ok", f"exact: {_compared(found.runs)} are identical, bit for bit")
    else:
        yield from _verdict(found.verdict, several=len(found.runs) > 1)
    for note in found.notes:
        yield console.finding("warning", note)
    if found.scratch is not None:
        yield console.indented(f"everything is kept in {found.scratch}")


def _line(facts: list[str]) -> Text:
    from rich.text import Text

    return Text("  " + console.wrap_fields(facts, indent=4, first=2))


def _kills(found: Rehearsal) -> str:
    several = len(found.runs) > 1
    shown = found.kills[:_FEW]
    more = f" and {len(found.kills) - _FEW:,} more" if len(found.kills) > _FEW else ""
    steps = ", ".join(f"{kill.step:,} of {kill.run}" if several else f"{kill.step:,}" for kill in shown)
    resumed = ", ".join(f"{kill.resumed_from:,}" for kill in shown)
    return f"killed after step {steps}{more}; resumed from {resumed}{more and ' …'}"


def _compared(runs: tuple[RunFacts, ...]) -> str:
    """``1,290 parameters, 24 optimizer buffers, the scheduler, the RNG and 17 series (1,530 points)``."""
    parameters, buffers, schedulers, series, points = (
        sum(getattr(run, name) for run in runs) for name in ("parameters", "buffers", "schedulers", "series", "points")
    )
    parts = [
        _counted(parameters, "parameter"),
        _counted(buffers, "optimizer buffer"),
        {0: "", 1: "the scheduler"}.get(schedulers, f"{schedulers} schedulers"),
        "the RNG" if any(run.rng for run in runs) else "",
    ]
    return f"{', '.join(filter(None, parts))} and {series:,} series with {points:,} points"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count > 1 else ''}" if count else ""


def _verdict(verdict: Diagnosis, *, several: bool) -> Iterator[RenderableType]:
    what = "not exact" if verdict.reproducible else "two uninterrupted trainings differ already"
    where = f": {_where(verdict.first, several=several)}" if verdict.first else ""
    yield console.finding("error", what + where)
    yield console.indented(verdict.cause.observation)
    yield console.indented(f"→ {verdict.cause.advice}")


def _where(first: Divergence, *, several: bool) -> str:
    of = f" of {first.run}" if several else ""
    if first.step is None:
        return f"only in the final checkpoint{of}, in {first.tensor}"
    text = f"first at step {first.step:,}{of}"
    if first.series is not None:
        text += f", in series {first.series} ({_pair(first.a, first.b)})"
    if first.tensor is not None:
        text += f"{',' if first.series is None else ' and'} in tensor {first.tensor}"
    return text


def _pair(a: float | None, b: float | None) -> str:
    if a is None or b is None:
        return "missing in the one" if a is None else "missing in the other"
    short = f"{a:.6g}", f"{b:.6g}"
    x, y = short if short[0] != short[1] else (repr(a), repr(b))
    return f"{x} against {y}"
