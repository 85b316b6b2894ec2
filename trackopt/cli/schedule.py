"""``trackopt schedule``: the LR of a schedule over steps, without training."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trackopt.cli import console, figures
from trackopt.errors import UsageError
from trackopt.plotting.figure import Curve, Panel
from trackopt.schedule.expression import Call, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.schedule.last_epoch import ResumeComparison
    from trackopt.schedule.preview import Preview

_STEPS = 100
_MOST = 1_000_000
_HEIGHT, _LOW_HEIGHT = 14, 6
_PLATEAU = "ReduceLROnPlateau"


@dataclass(frozen=True)
class _Schedule:
    """A schedule on the screen.

    Attributes:
        name: As it was written, and where it was resumed, how.
        preview: What it does.
    """

    name: str
    preview: Preview


@click.command()
@click.argument("schedules", nargs=-1, required=True, metavar="SCHEDULE...")
@click.option(
    "--lr",
    type=click.FloatRange(min=0),
    multiple=True,
    metavar="X",
    help="Of the optimizer; once for each parameter group.  [0.1]",
)
@click.option(
    "--steps", type=click.IntRange(1, _MOST), metavar="N", help="How many steps.  [100, or as many as --metric has]"
)
@click.option(
    "--metric",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"What {_PLATEAU} goes by: a number for each step, one to a line or as a JSON list.",
)
@figures.picture_options
@click.option("--csv", "as_csv", is_flag=True, help="Print the numbers as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def command(
    schedules: tuple[str, ...], lr: tuple[float, ...], steps: int | None, metric: Path | None, **outputs: Any
) -> None:
    r"""The learning rate of a schedule over steps, and the momentum where it moves, without training.

    SCHEDULE is a class of torch.optim.lr_scheduler with its arguments, without the optimizer; schedules may be nested.
    It is read, not evaluated. A function is named as package.module:function and imported. The optimizer is SGD with
    momentum 0.9. A schedule that is stepped once in an epoch has epochs for steps.

    \b
    Example:
      trackopt schedule "CosineAnnealingLR(T_max=40)" "StepLR(50, gamma=0.99)"
      trackopt schedule "SequentialLR([LinearLR(0.1), ExponentialLR(0.9)], [5])"
      trackopt schedule "OneCycleLR(0.1, total_steps=50)" --steps 50 --png lr.png
      trackopt schedule "ReduceLROnPlateau(patience=3)" --metric val_loss.txt
      trackopt schedule "LambdaLR(my_schedules:warmup)" --lr 0.5 --csv
      trackopt schedule "StepLR(30, last_epoch=59)"   # resumed by last_epoch
    """
    calls = {text: parse(text) for text in schedules}
    values = None if metric is None else _numbers(metric)
    if values is None and any(call.name == _PLATEAU for call in calls.values()):
        raise UsageError(f"{_PLATEAU}: goes by a metric; give --metric FILE, with a number for each step")
    count = steps or (len(values) if values else _STEPS)
    shown, resumed = _previews(calls, count, lr or (0.1,), values)
    panels = _panels(shown)
    figures.write_pictures(panels, png=outputs["png"], svg=outputs["svg"], title="learning rate schedules")
    if outputs["as_json"]:
        console.write_json({"schedules": [_as_dict(one) for one in shown]})
    elif outputs["as_csv"]:
        _write_csv(shown)
    else:
        console.show(_screen(panels, resumed))


def _previews(
    calls: dict[str, Call], steps: int, lr: tuple[float, ...], metric: list[float] | None
) -> tuple[list[_Schedule], list[ResumeComparison]]:
    from trackopt.schedule.classes import CONSTRUCTOR_ERRORS, constructor_error, factory, last_epoch
    from trackopt.schedule.last_epoch import resumption
    from trackopt.schedule.preview import preview

    shown: list[_Schedule] = []
    resumed: list[ResumeComparison] = []
    for text, call in calls.items():
        build = factory(call)
        try:
            if last_epoch(call) < 0:
                shown.append(_Schedule(text, preview(build, steps, lr=lr, metric=metric)))
                continue
            found = resumption(call, steps, lr)
        except UsageError:
            raise
        except CONSTRUCTOR_ERRORS as error:
            raise UsageError(f"{constructor_error(call.name, error)}; it was to give {steps:,} (--steps)") from error
        resumed.append(found)
        shown.append(_Schedule(f"{text}: from the start", found.uninterrupted))
        shown.append(_Schedule(f"{text}: resumed, optimizer restored", found.restored))
        shown.append(_Schedule(f"{text}: resumed, new optimizer", found.restarted))
    return shown, resumed


def _numbers(file: Path) -> list[float]:
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ").split()
        numbers = [float(value) for value in found]
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be read ({error.strerror}); name a file with a number for each step"
        ) from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{file}: not a series of numbers ({error}); write one to a line, or a JSON list") from error
    if not numbers:
        raise UsageError(f"{file}: holds no numbers; write one for each step")
    return numbers


def _panels(shown: Sequence[_Schedule]) -> list[Panel]:
    moved = {name.rpartition(".")[2]: None for one in shown for name in one.preview.hyper}
    return [_panel("learning rate", shown, "lr/", ""), *(_panel(kind, shown, "hyper/", f".{kind}") for kind in moved)]


def _panel(title: str, shown: Sequence[_Schedule], kind: str, key: str) -> Panel:
    """The curves of all schedules for one quantity, a curve for each parameter group."""
    curves = []
    for one in shown:
        for name, points in one.preview.series().items():
            if name.startswith(kind) and name.endswith(key):
                group = name.removeprefix(kind).removesuffix(key)
                name = f"{one.name} {group}" if len(one.preview.lr) > 1 else one.name
                curves.append(Curve(name, points))
    return Panel(title, tuple(curves))


def _screen(panels: Sequence[Panel], resumed: Sequence[ResumeComparison]) -> Iterator[RenderableType]:
    first, *others = panels
    yield from figures.render([(first, _HEIGHT)], legend=False)
    yield ""
    yield _table(first)
    if others:
        yield ""
        yield from figures.render([(panel, _LOW_HEIGHT) for panel in others])
    for found in resumed:
        yield ""
        yield from _told(found)


def _table(panel: Panel) -> Text:
    from trackopt.plotting.terminal import letter

    several = len(panel.curves) > 1
    rows = []
    for index, curve in enumerate(panel.curves):
        rates = [rate for _, rate in curve.points]
        numbers = [rates[0], min(rates), max(rates), rates[-1]]
        rows.append([*([letter(index)] if several else []), curve.name, *(f"{number:.4g}" for number in numbers)])
    heads = ["schedule", "first", "lowest", "highest", "last"]
    return console.table(["", *heads], rows, left=2) if several else console.table(heads, rows)


def _told(found: ResumeComparison) -> Iterator[RenderableType]:
    """What ``last_epoch`` means, and what comes of it."""
    yield console.finding(
        "info",
        f"last_epoch={found.completed_steps - 1} resumes after {found.completed_steps} step{'s' * (found.completed_steps != 1)}: it counts them from 0, "
        "so write one less than were done. Each parameter group must have an initial_lr: here that is --lr, in a "
        "script it comes with the optimizer's state_dict. The scheduler's own state_dict does all of this, and more "
        "surely.",
    )
    for how, preview in (
        ("with the optimizer's state_dict loaded first", found.restored),
        ("on a new optimizer", found.restarted),
    ):
        parting = found.first_difference(preview)
        if parting is None:
            yield console.finding("ok", f"{how}: as if it had never stopped")
        else:
            step, wrong, right = parting
            yield console.finding("warning", f"{how}: at step {step} the LR is {wrong:.4g} instead of {right:.4g}")


def _as_dict(one: _Schedule) -> dict[str, Any]:
    return {"schedule": one.name, "first_step": one.preview.steps[0], "lr": one.preview.lr, "hyper": one.preview.hyper}


def _write_csv(shown: Sequence[_Schedule]) -> None:
    """A row for each step; a schedule that was resumed has no cells before that."""
    columns: dict[str, dict[int, float]] = {}
    for one in shown:
        for name, points in one.preview.series().items():
            columns[f"{one.name} {name}"] = dict(points)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["step", *columns])
    for step in range(1, max(one.preview.steps[-1] for one in shown) + 1):
        writer.writerow([step, *(cells.get(step, "") for cells in columns.values())])
