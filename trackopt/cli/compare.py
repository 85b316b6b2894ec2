"""``trackopt compare``: compare runs in a table and by their curves."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from trackopt.cli import console, figures, live
from trackopt.journal.columns import Series
from trackopt.plotting.comparison import SPIKE_IQRS, WINDOW_STEPS, Comparison, Row, compare, is_compared
from trackopt.plotting.downsampling import downsample_series
from trackopt.plotting.figure import Curve, Panel
from trackopt.plotting.run_series import require_series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import RenderableType

    from trackopt.plotting.run_series import RunSeries

_LOSS = "loss"
_MAX_CURVES = 12  # curves
_MAX_NAME_LENGTH = 24
_MINUTE_S = 60
_NOTE_ROWS = 6  # approximate


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--metric", default=_LOSS, metavar="KEY", help=f"Compare by this series.  [{_LOSS}]")
@click.option("--max", "highest", is_flag=True, help="Treat higher values of the metric as better.")
@click.option(
    "--target", type=float, metavar="X", help="Set the value to reach.  [the worst of the runs' best, which all reach]"
)
@click.option("--follow", is_flag=True, help="Redraw while the runs continue, until they end or Ctrl-C.")
@click.option("--attach", is_flag=True, help="Attach the curves to the MLflow run of each run, as a PNG.")
@figures.picture_options
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(
    runs: tuple[str, ...], metric: str, highest: bool, target: float | None, follow: bool, **outputs: Any
) -> None:
    r"""Compare runs in a table and by their curves: hyperparameters, results, steps and time to a target, spikes.

    RUN is a run's directory. The best run comes first. Only hyperparameters that differ are shown.

    \b
    Example:
      trackopt compare runs/*
      trackopt compare runs/adamw runs/sgd --target 0.1 --png compare.png
      trackopt compare runs/* --metric accuracy --max --json
    """

    def compare_runs(tracked: Sequence[RunSeries]) -> Comparison:
        return compare(tracked, metric, target=target, highest=highest)

    readers = live.open_runs(runs, lambda key: is_compared(key, metric))
    if follow:
        rows = shutil.get_terminal_size().lines - 2
        live.follow(
            readers, lambda tracked: _render(compare_runs(tracked), tracked, given=target is not None, rows=rows)
        )
    tracked = live.read_runs(readers)
    require_series(tracked, metric)
    comparison = compare_runs(tracked)
    if outputs["as_json"]:
        console.write_json(comparison.as_dict())
    else:
        console.show(_render(comparison, tracked, given=target is not None))
    panels, title = [_build_panel(comparison, tracked)], console.sanitize(f"{len(tracked)} runs by {metric}")
    figures.write_pictures(panels, png=outputs["png"], svg=outputs["svg"], title=title)
    if outputs["attach"]:
        figures.attach_picture(panels, [reader.directory for reader in readers], name="compare", title=title)


def _render(
    comparison: Comparison, runs: Sequence[RunSeries], *, given: bool, rows: int | None = None
) -> Iterator[RenderableType]:
    tables = list(_render_tables(comparison))
    for table in tables:
        yield from table
        yield ""
    for note in _describe_columns(comparison, given=given):
        yield console.render_finding("info", note)
    rows_left = None if rows is None else rows - len(tables) * (len(comparison.rows) + 2) - _NOTE_ROWS
    yield ""
    yield from figures.render(figures.fit_panels([_build_panel(comparison, runs)], rows_left), legend=False)


def _build_panel(comparison: Comparison, runs: Sequence[RunSeries]) -> Panel:
    """Build the panel of the curves in the order of the table."""
    series = {run.path: run.series.get(comparison.metric, Series.of([])) for run in runs}
    curves = tuple(Curve(row.name, downsample_series(series[row.path])) for row in comparison.rows[:_MAX_CURVES])
    more = f" (the best {_MAX_CURVES} of {len(comparison.rows)})" if len(comparison.rows) > _MAX_CURVES else ""
    return Panel(f"{comparison.metric}{more}", curves).with_log_scale()


def _render_tables(comparison: Comparison) -> Iterator[Iterator[RenderableType]]:
    """Yield as many tables as the columns need; each starts with the names of the runs."""
    from rich.cells import cell_len

    from trackopt.plotting.terminal import curve_letter

    marks = [curve_letter(index) for index in range(len(comparison.rows))]
    names = [_shorten(console.sanitize(row.name)) for row in comparison.rows]
    columns = [
        (console.sanitize(head), [console.sanitize(show(row)) for row in comparison.rows])
        for head, show in _list_columns(comparison)
    ]
    width_left = console.text_width() - 2 - 1 - 3 - max(map(cell_len, [*names, "run"]))
    chosen: list[tuple[str, list[str]]] = []
    for head, cells in columns:
        if chosen and sum(_column_width(*column) for column in chosen) + _column_width(head, cells) > width_left:
            yield _render_table(marks, names, chosen)
            chosen = []
        if any(cells):
            chosen.append((head, cells))
    if chosen:
        yield _render_table(marks, names, chosen)


def _render_table(
    marks: Sequence[str], names: Sequence[str], columns: Sequence[tuple[str, list[str]]]
) -> Iterator[RenderableType]:
    heads, cells = zip(*columns, strict=True)
    if len(names) == 1:
        return console.render_table(["run", *heads], zip(names, *cells, strict=True))
    return console.render_table(["", "run", *heads], zip(marks, names, *cells, strict=True), left=2)


def _shorten(name: str) -> str:
    """Cut out the middle of a long name: runs of one experiment differ at the end."""
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    end = _MAX_NAME_LENGTH * 2 // 3
    return f"{name[: _MAX_NAME_LENGTH - end - 1]}…{name[-end:]}"


def _column_width(head: str, cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, [head, *cells])) + 3


def _list_columns(comparison: Comparison) -> Iterator[tuple[str, Callable[[Row], str]]]:
    for label in comparison.settings_shown():
        yield label.removeprefix("scheduler."), partial(_format_setting, label)
    yield "status", lambda row: row.status or "running"
    yield "steps", lambda row: f"{row.steps:,}"
    yield "final", lambda row: _format_number(row.final)
    yield "best", lambda row: _format_number(row.best)
    yield "at step", lambda row: _format_count(row.best_step)
    yield "to target", lambda row: _format_count(row.steps_to_target)
    yield "time", lambda row: _format_duration(row.seconds_to_target)
    yield "spikes", lambda row: console.format_percent(row.spikes)
    yield "update ratio", lambda row: _format_number(row.update_ratio)
    yield "ms/step", lambda row: _format_number(row.step_ms)


def _describe_columns(comparison: Comparison, *, given: bool) -> Iterator[str]:
    if comparison.target is not None:
        reason = "" if given else ", the worst of the runs' best, which all reach"
        better = "above" if comparison.highest else "below"
        reached = any(row.steps_to_target is not None for row in comparison.rows)
        first = "to target, time: the first step" if reached else "to target: no run has a step"
        yield f"{first} at {comparison.target:.4g} or {better}{reason}"
    side = "below" if comparison.highest else "above"
    yield (
        f"spikes: steps whose {console.sanitize(comparison.metric)} is NaN or infinite, or {side} the median of "
        f"the previous {WINDOW_STEPS} steps by more than {SPIKE_IQRS} of their interquartile ranges"
    )
    if any(row.update_ratio is not None for row in comparison.rows):
        yield "update ratio: the norm of an update relative to the norm of the parameters; the median"


def _format_setting(label: str, row: Row) -> str:
    value = row.settings.get(label, "")
    return value if isinstance(value, str) else console.format_number(value)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _format_count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds < 2 * _MINUTE_S else f"{seconds / _MINUTE_S:,.1f} min"
