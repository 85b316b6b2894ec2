"""``trackopt schedule``: show the LR of a schedule over steps, without training."""

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

    from trackopt.schedule.last_epoch import ResumeComparison
    from trackopt.schedule.preview import Preview
    from trackopt.utils.types import JsonObject

_DEFAULT_STEPS = 100
_MAX_STEPS = 1_000_000
_FIRST_PANEL_HEIGHT, _OTHER_PANEL_HEIGHT = 14, 6
_PLATEAU = "ReduceLROnPlateau"


@dataclass(frozen=True)
class _Schedule:
    """A schedule to show.

    Attributes:
        name: The expression, and how it was resumed.
        preview: Its LR over steps.
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
    help="Set the initial learning rate; repeat once per parameter group.  [0.1]",
)
@click.option(
    "--steps",
    type=click.IntRange(1, _MAX_STEPS),
    metavar="N",
    help="Show N steps.  [100, or as many as --metric has]",
)
@click.option(
    "--metric",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"Read the metric of {_PLATEAU}: one number per step, on its own line or in a JSON list.",
)
@figures.picture_options
@click.option("--csv", "as_csv", is_flag=True, help="Print the numbers as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def command(
    schedules: tuple[str, ...], lr: tuple[float, ...], steps: int | None, metric: Path | None, **outputs: Any
) -> None:
    r"""Show the learning rate of a schedule over steps, and the momentum if it changes, without training.

    SCHEDULE is a class of torch.optim.lr_scheduler with its arguments, without the optimizer; schedules may be nested.
    It is parsed, not evaluated. A function is written as package.module:function and imported. The optimizer is SGD
    with momentum 0.9. For a schedule that is stepped once per epoch, a step is an epoch.

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
    values = None if metric is None else _read_numbers(metric)
    if values is None and any(call.name == _PLATEAU for call in calls.values()):
        raise UsageError(f"{_PLATEAU}: needs a metric; pass --metric FILE with one number per step")
    count = steps or (len(values) if values else _DEFAULT_STEPS)
    schedules_shown, resumed = _preview_all(calls, count, lr or (0.1,), values)
    panels = _build_panels(schedules_shown)
    figures.write_pictures(panels, png=outputs["png"], svg=outputs["svg"], title="learning rate schedules")
    if outputs["as_json"]:
        console.write_json({"schedules": [_as_dict(schedule) for schedule in schedules_shown]})
    elif outputs["as_csv"]:
        _write_csv(schedules_shown)
    else:
        console.show(_render(panels, resumed))


def _preview_all(
    calls: dict[str, Call], steps: int, lr: tuple[float, ...], metric: list[float] | None
) -> tuple[list[_Schedule], list[ResumeComparison]]:
    from trackopt.schedule.classes import CONSTRUCTOR_ERRORS, constructor_error, get_last_epoch, make_factory
    from trackopt.schedule.last_epoch import compare_resume
    from trackopt.schedule.preview import preview

    shown: list[_Schedule] = []
    resumed: list[ResumeComparison] = []
    for text, call in calls.items():
        build = make_factory(call)
        try:
            if get_last_epoch(call) < 0:
                shown.append(_Schedule(text, preview(build, steps, lr=lr, metric=metric)))
                continue
            comparison = compare_resume(call, steps, lr)
        except UsageError:
            raise
        except CONSTRUCTOR_ERRORS as error:
            raise UsageError(
                f"{constructor_error(call.name, error)}; {steps:,} steps were requested (--steps)"
            ) from error
        resumed.append(comparison)
        shown.append(_Schedule(f"{text}: from the start", comparison.uninterrupted))
        shown.append(_Schedule(f"{text}: resumed, optimizer restored", comparison.restored))
        shown.append(_Schedule(f"{text}: resumed, new optimizer", comparison.restarted))
    return shown, resumed


def _read_numbers(file: Path) -> list[float]:
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ").split()
        numbers = [float(value) for value in values]
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); name a file with one number per step") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{file}: not a series of numbers ({error}); write one to a line, or a JSON list") from error
    if not numbers:
        raise UsageError(f"{file}: holds no numbers; write one for each step")
    return numbers


def _build_panels(shown: Sequence[_Schedule]) -> list[Panel]:
    moved = {name.rpartition(".")[2]: None for schedule in shown for name in schedule.preview.hyper}
    return [
        _build_panel("learning rate", shown, "lr/", ""),
        *(_build_panel(kind, shown, "hyper/", f".{kind}") for kind in moved),
    ]


def _build_panel(title: str, shown: Sequence[_Schedule], kind: str, key: str) -> Panel:
    """Build the panel of one quantity: a curve for each schedule and parameter group."""
    curves = []
    for schedule in shown:
        for name, points in schedule.preview.series().items():
            if name.startswith(kind) and name.endswith(key):
                group = name.removeprefix(kind).removesuffix(key)
                name = f"{schedule.name} {group}" if len(schedule.preview.lr) > 1 else schedule.name
                curves.append(Curve(name, points))
    return Panel(title, tuple(curves))


def _render(panels: Sequence[Panel], resumed: Sequence[ResumeComparison]) -> Iterator[RenderableType]:
    first, *others = panels
    yield from figures.render([(first, _FIRST_PANEL_HEIGHT)], legend=False)
    yield ""
    yield from _render_table(first)
    if others:
        yield ""
        yield from figures.render([(panel, _OTHER_PANEL_HEIGHT) for panel in others])
    for comparison in resumed:
        yield ""
        yield from _explain_last_epoch(comparison)


def _render_table(panel: Panel) -> Iterator[RenderableType]:
    from trackopt.plotting.terminal import curve_letter

    several = len(panel.curves) > 1
    rows = []
    for index, curve in enumerate(panel.curves):
        rates = [rate for _, rate in curve.points]
        numbers = [rates[0], min(rates), max(rates), rates[-1]]
        rows.append([*([curve_letter(index)] if several else []), curve.name, *(f"{number:.4g}" for number in numbers)])
    heads = ["schedule", "first", "lowest", "highest", "last"]
    return console.render_table(["", *heads], rows, left=2) if several else console.render_table(heads, rows)


def _explain_last_epoch(comparison: ResumeComparison) -> Iterator[RenderableType]:
    """Explain the meaning of ``last_epoch`` and the effect of the resume."""
    count = comparison.completed_steps
    yield console.render_finding(
        "info",
        f"last_epoch={count - 1} resumes after {count} step{'s' * (count != 1)}: it counts from 0, so pass one less "
        "than the completed steps. Each parameter group must have an initial_lr: here it is --lr, in a script it comes "
        "with the optimizer's state_dict. Loading the scheduler's own state_dict does all of this more reliably.",
    )
    for how, preview in (
        ("with the optimizer's state_dict loaded first", comparison.restored),
        ("on a new optimizer", comparison.restarted),
    ):
        difference = comparison.first_difference(preview)
        if difference is None:
            yield console.render_finding("ok", f"{how}: as if it had never stopped")
        else:
            step, wrong, right = difference
            yield console.render_finding(
                "warning", f"{how}: at step {step} the LR is {wrong:.4g} instead of {right:.4g}"
            )


def _as_dict(schedule: _Schedule) -> JsonObject:
    return {
        "schedule": schedule.name,
        "first_step": schedule.preview.steps[0],
        "lr": schedule.preview.lr,
        "hyper": schedule.preview.hyper,
    }


def _write_csv(shown: Sequence[_Schedule]) -> None:
    """Write one row for each step; a resumed schedule has no cells before its resume."""
    columns: dict[str, dict[int, float]] = {}
    for schedule in shown:
        for name, points in schedule.preview.series().items():
            columns[f"{schedule.name} {name}"] = dict(points)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["step", *columns])
    for step in range(1, max(schedule.preview.steps[-1] for schedule in shown) + 1):
        writer.writerow([step, *(cells.get(step, "") for cells in columns.values())])
