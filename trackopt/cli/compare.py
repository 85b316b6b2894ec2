"""``trackopt compare``: runs side by side."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from trackopt.cli import console, figures, live
from trackopt.plotting.comparison import SPIKE_IQRS, WINDOW, Comparison, Row, compare, wanted
from trackopt.plotting.figure import Curve, Panel
from trackopt.plotting.run_series import require_series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.plotting.run_series import RunSeries

_LOSS = "loss"
_MOST = 12  # curves
_LONGEST_NAME = 24
_MINUTE = 60
_NOTES = 6  # rows, about


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--metric", default=_LOSS, metavar="KEY", help=f"The series to compare by.  [{_LOSS}]")
@click.option("--max", "highest", is_flag=True, help="The higher the metric, the better.")
@click.option(
    "--target", type=float, metavar="X", help="A value to reach.  [the worst of the runs' best, which all reach]"
)
@click.option("--follow", is_flag=True, help="Draw again as the runs go on, until they end or Ctrl-C.")
@click.option("--attach", is_flag=True, help="Attach the curves to the MLflow run of each run, as a PNG.")
@figures.picture_options
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(
    runs: tuple[str, ...], metric: str, highest: bool, target: float | None, follow: bool, **outputs: Any
) -> None:
    r"""Runs side by side: what they were given, what came of it, how soon and how steadily; and their curves.

    RUN is a run's directory. The best run stands first. Of the hyperparameters those are shown that differ.

    \b
    Example:
      trackopt compare runs/*
      trackopt compare runs/adamw runs/sgd --target 0.1 --png compare.png
      trackopt compare runs/* --metric accuracy --max --json
    """

    def facts(tracked: Sequence[RunSeries]) -> Comparison:
        return compare(tracked, metric, target=target, highest=highest)

    readers = live.read(runs, lambda key: wanted(key, metric))
    if follow:
        rows = shutil.get_terminal_size().lines - 2
        live.follow(readers, lambda tracked: _screen(facts(tracked), tracked, given=target is not None, rows=rows))
    tracked = live.read_runs(readers)
    require_series(tracked, metric)
    found = facts(tracked)
    if outputs["as_json"]:
        console.write_json(found.as_dict())
    else:
        console.show(_screen(found, tracked, given=target is not None))
    panels, title = [_panel(found, tracked)], console.sanitize(f"{len(tracked)} runs by {metric}")
    figures.write_pictures(panels, png=outputs["png"], svg=outputs["svg"], title=title)
    if outputs["attach"]:
        figures.attach(panels, [reader.directory for reader in readers], name="compare", title=title)


def _screen(
    found: Comparison, runs: Sequence[RunSeries], *, given: bool, rows: int | None = None
) -> Iterator[RenderableType]:
    tables = list(_tables(found))
    for table in tables:
        yield table
        yield ""
    for note in _notes(found, given=given):
        yield console.finding("info", note)
    left = None if rows is None else rows - len(tables) * (len(found.rows) + 2) - _NOTES
    yield ""
    yield from figures.render(figures.panel_height([_panel(found, runs)], left), legend=False)


def _panel(found: Comparison, runs: Sequence[RunSeries]) -> Panel:
    """The curves in the order of the table."""
    series = {run.path: run.series.get(found.metric, []) for run in runs}
    curves = tuple(Curve(row.name, series[row.path]) for row in found.rows[:_MOST])
    more = f" (the best {_MOST} of {len(found.rows)})" if len(found.rows) > _MOST else ""
    return Panel(f"{found.metric}{more}", curves).scaled()


def _tables(found: Comparison) -> Iterator[Text]:
    """As many tables as it takes; each begins with the names of the runs."""
    from rich.cells import cell_len

    from trackopt.plotting.terminal import letter

    marks = [letter(index) for index in range(len(found.rows))]
    names = [_short(console.sanitize(row.name)) for row in found.rows]
    columns = [
        (console.sanitize(head), [console.sanitize(show(row)) for row in found.rows]) for head, show in _columns(found)
    ]
    room = console.text_width() - 2 - 1 - 3 - max(map(cell_len, [*names, "run"]))
    chosen: list[tuple[str, list[str]]] = []
    for head, cells in columns:
        if chosen and sum(_wide(*column) for column in chosen) + _wide(head, cells) > room:
            yield _table(marks, names, chosen)
            chosen = []
        if any(cells):
            chosen.append((head, cells))
    yield _table(marks, names, chosen)


def _table(marks: Sequence[str], names: Sequence[str], columns: Sequence[tuple[str, list[str]]]) -> Text:
    heads, cells = zip(*columns, strict=True)
    if len(names) == 1:
        return console.table(["run", *heads], zip(names, *cells, strict=True))
    return console.table(["", "run", *heads], zip(marks, names, *cells, strict=True), left=2)


def _short(name: str) -> str:
    """A long name without its middle: runs of one experiment, or with one name, differ at the end."""
    if len(name) <= _LONGEST_NAME:
        return name
    end = _LONGEST_NAME * 2 // 3
    return f"{name[: _LONGEST_NAME - end - 1]}…{name[-end:]}"


def _wide(head: str, cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, [head, *cells])) + 3


def _columns(found: Comparison) -> Iterator[tuple[str, Callable[[Row], str]]]:
    for label in found.differing():
        yield label.removeprefix("scheduler."), partial(_setting, label)
    yield "status", lambda row: row.status or "going on"
    yield "steps", lambda row: f"{row.steps:,}"
    yield "final", lambda row: _number(row.final)
    yield "best", lambda row: _number(row.best)
    yield "at step", lambda row: _count(row.best_step)
    yield "to target", lambda row: _count(row.steps_to_target)
    yield "time", lambda row: _duration(row.seconds_to_target)
    yield "spikes", lambda row: console.format_percent(row.spikes)
    yield "update ratio", lambda row: _number(row.update_ratio)
    yield "ms/step", lambda row: _number(row.step_ms)


def _notes(found: Comparison, *, given: bool) -> Iterator[str]:
    if found.target is not None:
        reason = "" if given else ", the worst of the runs' best, which all reach"
        better = "above" if found.highest else "below"
        reached = any(row.steps_to_target is not None for row in found.rows)
        first = "to target, time: the first step" if reached else "to target: no run has a step"
        yield f"{first} at {found.target:.4g} or {better}{reason}"
    side = "below" if found.highest else "above"
    yield (
        f"spikes: steps whose {console.sanitize(found.metric)} is NaN or infinite, or {side} the median of the {WINDOW} "
        f"steps before by more than {SPIKE_IQRS} of their interquartile ranges"
    )
    if any(row.update_ratio is not None for row in found.rows):
        yield "update ratio: how far a step moves the parameters, relative to them; the median"


def _setting(label: str, row: Row) -> str:
    value = row.settings.get(label, "")
    return value if isinstance(value, str) else console.number(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds < 2 * _MINUTE else f"{seconds / _MINUTE:,.1f} min"
