"""``trackopt rehearse``: prove that a training command resumes exactly."""

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
    from trackopt.rehearsal.rehearse import OnProgress, Rehearsal, RunFacts

_MAX_KILLS = 8
_EXIT_NOT_EXACT = 1


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--kills",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Kill the training N times, at random steps.  [default: {KILLS}]",
)
@click.option(
    "--at",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="STEP",
    help="Kill the training after this step instead; repeatable.",
)
@click.option(
    "--seed", type=int, default=0, metavar="N", help="Set the random seed for choosing the kill steps.  [default: 0]"
)
@click.option(
    "--resume-with",
    default="",
    metavar="WORDS",
    help="Append this to the command after a kill; {checkpoint} is the newest checkpoint that it wrote.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    kills: int | None, at: tuple[int, ...], seed: int, resume_with: str, as_json: bool, command: tuple[str, ...]
) -> int:
    r"""Prove that a training resumes exactly: run it, run it again under SIGKILL, and compare bit for bit.

    COMMAND is a training command, with or without trackopt. It runs to its end twice, and a third time if both differ,
    in a copy of this directory: small files and checkpoints are copied, larger files are links. The copy and the runs
    are in a scratch directory (below TMPDIR), which is kept if something is wrong. After a kill the command is started
    again as it was, or with the words of --resume-with.

    \b
    Example:
      trackopt rehearse -- python train.py --epochs 2
      trackopt rehearse --at 100 --at 150 -- python train.py
      trackopt rehearse --resume-with '--resume {checkpoint}' -- python train.py

    Exit codes: 0 exact, 1 not exact, 2 trouble: the command fails or makes no step.
    """
    if kills is not None and at:
        raise click.UsageError("--kills and --at exclude each other")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the training would be orphaned
    try:
        with _progress_bar() as report:
            words = _split(resume_with)
            rehearsal = rehearse(command, kills=kills or KILLS, at=at, seed=seed, resume_with=words, on_progress=report)
    except CommandError as error:
        for line in error.output_tail:
            click.echo(f"  {console.sanitize(line)}", err=True)
        raise
    if as_json:
        console.write_json(rehearsal.as_dict())
    else:
        console.show(_render(rehearsal))
    return 0 if rehearsal.exact else _EXIT_NOT_EXACT


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise click.UsageError(f"--resume-with {words}: {error}") from error


@contextmanager
def _progress_bar() -> Iterator[OnProgress]:
    """Show a progress bar if stderr is a terminal; yield the function that updates it."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[steps]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, steps="")

        def report(stage: str, done: int, total: int | None) -> None:
            steps = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
            bar.update(task, description=stage, completed=done, total=total, steps=steps)

        yield report


def _render(rehearsal: Rehearsal) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(f"rehearsed  {console.sanitize(shlex.join(rehearsal.command))}", style="bold")
    steps = sum(run.steps for run in rehearsal.runs)
    runs = f"{len(rehearsal.runs)} runs, " if len(rehearsal.runs) > 1 else ""
    yield _render_line([f"uninterrupted   {runs}{steps:,} steps", f"{rehearsal.seconds[0]:.1f} s"])
    if rehearsal.kills:
        yield _render_line([_describe_kills(rehearsal), f"{rehearsal.seconds[1]:.1f} s"])
    yield ""
    if rehearsal.verdict is None:
        yield console.render_finding("ok", f"exact: {_describe_compared(rehearsal.runs)} are identical, bit for bit")
    else:
        yield from _render_verdict(rehearsal.verdict, several=len(rehearsal.runs) > 1)
    for note in rehearsal.notes:
        yield console.render_finding("warning", note)
    if rehearsal.scratch is not None:
        yield console.render_indented(f"everything is kept in {rehearsal.scratch}")


def _render_line(facts: list[str]) -> Text:
    from rich.text import Text

    return Text("  " + console.wrap_fields(facts, indent=4, first=2))


def _describe_kills(rehearsal: Rehearsal) -> str:
    several = len(rehearsal.runs) > 1
    kills = rehearsal.kills[:_MAX_KILLS]
    more = f" and {len(rehearsal.kills) - _MAX_KILLS:,} more" if len(rehearsal.kills) > _MAX_KILLS else ""
    steps = ", ".join(f"{kill.step:,} of {kill.run}" if several else f"{kill.step:,}" for kill in kills)
    resumed = ", ".join(f"{kill.resumed_from:,}" for kill in kills)
    return f"killed after step {steps}{more}; resumed from {resumed}{more and ' …'}"


def _describe_compared(runs: tuple[RunFacts, ...]) -> str:
    """``1,290 parameters, 24 optimizer buffers, the scheduler, the RNG and 17 series (1,530 points)``."""
    if observed := [run for run in runs if run.tensors]:
        tensors, steps = (sum(getattr(run, name) for run in observed) for name in ("tensors", "steps"))
        compared = f"batches, {tensors:,} tensors of the model, optimizer state, learning rates and losses"
        return f"{compared} of {steps:,} steps"
    parameters, buffers, schedulers, series, points = (
        sum(getattr(run, name) for run in runs) for name in ("parameters", "buffers", "schedulers", "series", "points")
    )
    parts = [
        _format_count(parameters, "parameter"),
        _format_count(buffers, "optimizer buffer"),
        {0: "", 1: "the scheduler"}.get(schedulers, f"{schedulers} schedulers"),
        "the RNG" if any(run.rng for run in runs) else "",
    ]
    return f"{', '.join(filter(None, parts))} and {series:,} series with {points:,} points"


def _format_count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count > 1 else ''}" if count else ""


def _render_verdict(verdict: Diagnosis, *, several: bool) -> Iterator[RenderableType]:
    what = "not exact" if verdict.reproducible else "two uninterrupted trainings differ already"
    where = f": {_describe_divergence(verdict.first, several=several)}" if verdict.first else ""
    yield console.render_finding("error", what + where)
    yield console.render_indented(verdict.cause.observation)
    yield console.render_indented(f"→ {verdict.cause.advice}")


def _describe_divergence(first: Divergence, *, several: bool) -> str:
    of = f" of {first.run}" if several else ""
    if first.step is None:
        return f"only in the final checkpoint{of}, in {first.tensor}"
    text = f"first at step {first.step:,}{of}"
    if first.series is not None:
        text += f", in series {first.series} ({_format_pair(first.a, first.b)})"
    if first.tensor is not None:
        text += f"{',' if first.series is None else ' and'} in tensor {first.tensor}"
    return text


def _format_pair(a: float | None, b: float | None) -> str:
    if a is None or b is None:
        return "missing in the first" if a is None else "missing in the second"
    texts = f"{a:.6g}", f"{b:.6g}"
    x, y = texts if texts[0] != texts[1] else (repr(a), repr(b))
    return f"{x} against {y}"
