"""``trackopt plot``: plot loss, learning rate and buffers of runs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import click

from trackopt.cli import console, figures, live
from trackopt.errors import UsageError
from trackopt.plotting import panels as layout
from trackopt.plotting.downsampling import select_points
from trackopt.plotting.run_series import RunSeries, require_series

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from trackopt.plotting.figure import Panel
    from trackopt.utils.types import JsonObject

_LOSS = "loss"


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--metric", "metrics", multiple=True, metavar="KEY", help=f"Plot this series; repeatable.  [{_LOSS}]")
@click.option("--mean", is_flag=True, help="Plot the mean of the runs with a band of one standard deviation.")
@click.option("--follow", is_flag=True, help="Redraw while the runs continue, until they end or Ctrl-C.")
@click.option("--attach", is_flag=True, help="Attach the curves to the MLflow run of each run, as a PNG.")
@figures.picture_options
@click.option("--json", "as_json", is_flag=True, help="Print the series as JSON; long ones as they are drawn.")
@click.option("--all", "every", is_flag=True, help="With --json: print every point of long series.")
def command(
    runs: tuple[str, ...], metrics: tuple[str, ...], mean: bool, follow: bool, attach: bool, every: bool, **outputs: Any
) -> None:
    r"""Plot loss, learning rate and optimizer buffers of runs from their journals.

    RUN is a run's directory. A buffer is drawn as the mean of its values with a band of one standard deviation. Of a
    series with more than 8,000 points the first, lowest, highest and last of each of 2,000 columns are drawn.

    \b
    Example:
      trackopt plot runs/digits
      trackopt plot runs/digits --follow
      trackopt plot runs/seed-* --mean --metric loss --metric accuracy
    """
    metrics = tuple(dict.fromkeys(metrics)) or (_LOSS,)
    if mean and len(set(runs)) < 2:
        raise UsageError("--mean: needs several runs; name more than one")

    def build(tracked: Sequence[RunSeries]) -> list[Panel]:
        return layout.build_mean_panels(tracked, metrics) if mean else layout.build_panels(tracked, metrics)

    readers = live.open_runs(runs, lambda key: layout.is_drawn(key, metrics))
    if follow:
        rows = shutil.get_terminal_size().lines - 2
        live.follow(readers, lambda tracked: _render(tracked, build(tracked), rows))
    tracked = live.read_runs(readers)
    for metric in metrics:
        require_series(tracked, metric)
    if outputs["as_json"]:
        console.write_json({"runs": [_as_dict(run, every=every) for run in tracked]})
    else:
        console.show(_render(tracked, build(tracked)))
    figures.write_pictures(build(tracked), png=outputs["png"], svg=outputs["svg"], title=_format_title(tracked))
    if attach:
        directories = [reader.directory for reader in readers]
        figures.attach_picture(build(tracked), directories, name="plot", title=_format_title(tracked))


def _render(runs: Sequence[RunSeries], panels: Sequence[Panel], rows: int | None = None) -> Iterator[RenderableType]:
    from rich.text import Text

    facts = [
        f"{run.name} · {run.steps:,} step{'s' * (run.steps != 1)}{f' · {run.status}' if run.status else ''}"
        for run in runs
    ]
    yield Text(console.wrap_fields(facts, indent=2, first=0), style="dim")
    for text in figures.render(figures.fit_panels(panels, rows)):
        yield ""
        yield text


def _format_title(runs: Sequence[RunSeries]) -> str:
    return console.sanitize(", ".join(run.name for run in runs))


def _as_dict(run: RunSeries, *, every: bool) -> JsonObject:
    shown = run.series if every else {key: select_points(series) for key, series in run.series.items()}
    return {
        "path": run.path,
        "name": run.name,
        "status": run.status,
        "steps": run.steps,
        "complete": all(len(shown[key]) == len(series) for key, series in run.series.items()),
        "series": {key: list(series) for key, series in shown.items()},
    }
