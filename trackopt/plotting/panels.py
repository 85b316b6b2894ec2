"""From runs to panels: which series stand together, and what band is around them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from trackopt.plotting.figure import Curve, Panel
from trackopt.plotting.run_series import RunSeries, names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LR = "lr/"
_MEAN, _STD = ".mean", ".std"
_NO_BUFFERS = ("grad/", "param/", "update/")
_MOST = 12  # curves in a panel


def wanted(key: str, metrics: Sequence[str]) -> bool:
    """Whether a series is drawn: a metric, an LR, or the mean or the standard deviation of a buffer."""
    return key in metrics or key.startswith(_LR) or (_is_buffer(key) and key.endswith((_MEAN, _STD)))


def panels(runs: Sequence[RunSeries], metrics: Sequence[str]) -> list[Panel]:
    """The metrics, the LRs and the buffers of runs; a buffer has a band of one standard deviation around its mean.

    Args:
        runs: Whose series to draw.
        metrics: The series to begin with.

    Example:
        >>> series = {"loss": [(1, 0.5)], "exp_avg/group0.mean": [(1, 0.0)], "exp_avg/group0.std": [(1, 0.2)]}
        >>> run = Tracked("runs/a", "a", None, {}, series, [], frozenset(series))
        >>> [panel.title for panel in panels([run], ["loss"])]
        ['loss', 'exp_avg: mean ± std']
    """
    found = [_panel(title, runs, keys) for title, keys in _layout(runs, metrics)]
    return [panel.scaled() for panel in found[: len(metrics)]] + found[len(metrics) :]


def averaged(runs: Sequence[RunSeries], metrics: Sequence[str]) -> list[Panel]:
    """The same panels with the mean of all runs, and a band of one standard deviation over the runs.

    Only steps that each of them has recorded count.
    """
    found = []
    for title, keys in _layout(runs, metrics):
        several = len(keys) > 1
        curves = [_average(runs, key, group if several else "") for key, group in list(keys.items())[:_MOST]]
        if any(curve.points for curve in curves):  # a buffer may be one of some runs only
            found.append(Panel(f"{title.partition(':')[0]}: mean ± std over {len(runs)} runs", tuple(curves)))
    return found


def _layout(runs: Sequence[RunSeries], metrics: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The title of each panel and its series, each with what tells it from the others."""
    for metric in metrics:
        yield metric, {metric: ""}
    known = list(dict.fromkeys(key for run in runs for key in run.series))
    if rates := {key: key.removeprefix(_LR) for key in known if key.startswith(_LR)}:
        yield "learning rate", rates
    buffers: dict[str, dict[str, str]] = defaultdict(dict)
    for key in known:
        if _is_buffer(key) and key.endswith(_MEAN):
            buffer, _, group = key.removesuffix(_MEAN).partition("/")
            buffers[buffer][key] = group
    for buffer, keys in buffers.items():
        yield f"{buffer}: mean ± std", keys


def _average(runs: Sequence[RunSeries], key: str, name: str) -> Curve:
    each = [dict(run.series.get(key, [])) for run in runs]
    points, band = [], []
    for step in sorted(set(each[0]).intersection(*each[1:])):
        values = [series[step] for series in each]
        mean = statistics.fmean(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
        points.append((step, mean))
        band.append((step, mean - spread, mean + spread))
    return Curve(name, points, band)


def _panel(title: str, runs: Sequence[RunSeries], keys: dict[str, str]) -> Panel:
    """A curve for each run and each of the keys that it has; the values of ``keys`` tell them apart."""
    curves = []
    for run, name in zip(runs, names(runs), strict=True):
        there = [key for key in keys if key in run.series]
        for same in _is_constant(run, there):
            groups = "" if len(same) == len(there) else ", ".join(keys[key] for key in same)
            label = " ".join(filter(None, [name if len(runs) > 1 else "", groups]))
            curves.append(Curve(label, run.series[same[0]], list(_band(run, same[0]))))
    if len(curves) == 1 < len(runs):
        title = f"{title} ({curves[0].name})"  # a lone curve has no legend, and could be of any of them
    if len(curves) > _MOST:
        title, curves = f"{title} ({_MOST} of {len(curves)})", curves[:_MOST]
    return Panel(title, tuple(curves))


def _is_constant(run: RunSeries, keys: Sequence[str]) -> list[list[str]]:
    """The LRs of groups are often the same; they are one curve."""
    found: list[list[str]] = []
    for key in keys:
        same = next((each for each in found if run.series[each[0]] == run.series[key] and key.startswith(_LR)), None)
        if same is None:
            found.append([key])
        else:
            same.append(key)
    return found


def _band(run: RunSeries, key: str) -> Iterator[tuple[float, float, float]]:
    if not key.endswith(_MEAN):
        return
    spread = dict(run.series.get(key.removesuffix(_MEAN) + _STD, []))
    for step, mean in run.series[key]:
        if step in spread:
            yield step, mean - spread[step], mean + spread[step]


def _is_buffer(key: str) -> bool:
    return "/" in key and not key.startswith((_LR, *_NO_BUFFERS))
