"""Build panels from runs: choose the series of each panel and the bands around the curves."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from trackopt.plotting.figure import Curve, Panel
from trackopt.plotting.run_series import RunSeries, display_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LR = "lr/"
_MEAN, _STD = ".mean", ".std"
_NOT_BUFFERS = ("grad/", "param/", "update/")
_MAX_CURVES = 12  # in one panel


def is_drawn(key: str, metrics: Sequence[str]) -> bool:
    """Return whether a series is drawn: a metric, an LR, or the mean or standard deviation of a buffer."""
    return key in metrics or key.startswith(_LR) or (_is_buffer(key) and key.endswith((_MEAN, _STD)))


def build_panels(runs: Sequence[RunSeries], metrics: Sequence[str]) -> list[Panel]:
    """Build panels of metrics, LRs and buffers; a buffer's band is one standard deviation around its mean.

    Args:
        runs: The runs to draw.
        metrics: The series of the first panels.

    Example:
        >>> series = {"loss": [(1, 0.5)], "exp_avg/group0.mean": [(1, 0.0)], "exp_avg/group0.std": [(1, 0.2)]}
        >>> run = RunSeries("runs/a", "a", None, {}, series, [], frozenset(series))
        >>> [panel.title for panel in build_panels([run], ["loss"])]
        ['loss', 'exp_avg: mean ± std']
    """
    drawn = [_build_panel(title, runs, keys) for title, keys in _list_panels(runs, metrics)]
    return [panel.with_log_scale() for panel in drawn[: len(metrics)]] + drawn[len(metrics) :]


def build_mean_panels(runs: Sequence[RunSeries], metrics: Sequence[str]) -> list[Panel]:
    """Build the same panels with the mean over all runs, in a band of one standard deviation over the runs.

    Only steps that every run has recorded count.
    """
    drawn = []
    for title, keys in _list_panels(runs, metrics):
        several = len(keys) > 1
        curves = [
            _average_curve(runs, key, group if several else "") for key, group in list(keys.items())[:_MAX_CURVES]
        ]
        if any(curve.points for curve in curves):  # only some runs may have a buffer
            drawn.append(Panel(f"{title.partition(':')[0]}: mean ± std over {len(runs)} runs", tuple(curves)))
    return drawn


def _list_panels(runs: Sequence[RunSeries], metrics: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the title of each panel and its series, each with its label within the panel."""
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


def _average_curve(runs: Sequence[RunSeries], key: str, name: str) -> Curve:
    runs_points = [dict(run.series.get(key, [])) for run in runs]
    points, band = [], []
    for step in sorted(set(runs_points[0]).intersection(*runs_points[1:])):
        values = [series[step] for series in runs_points]
        mean = statistics.fmean(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
        points.append((step, mean))
        band.append((step, mean - deviation, mean + deviation))
    return Curve(name, points, band)


def _build_panel(title: str, runs: Sequence[RunSeries], keys: dict[str, str]) -> Panel:
    """Draw one curve per run and series; the values of ``keys`` label the series."""
    curves = []
    for run, name in zip(runs, display_names(runs), strict=True):
        present = [key for key in keys if key in run.series]
        for same in _group_equal(run, present):
            groups = "" if len(same) == len(present) else ", ".join(keys[key] for key in same)
            label = " ".join(filter(None, [name if len(runs) > 1 else "", groups]))
            curves.append(Curve(label, run.series[same[0]], list(_std_band(run, same[0]))))
    if len(curves) == 1 < len(runs):
        title = f"{title} ({curves[0].name})"  # a single curve has no legend that names its run
    if len(curves) > _MAX_CURVES:
        title, curves = f"{title} ({_MAX_CURVES} of {len(curves)})", curves[:_MAX_CURVES]
    return Panel(title, tuple(curves))


def _group_equal(run: RunSeries, keys: Sequence[str]) -> list[list[str]]:
    """Group the keys whose LRs are equal; they share one curve."""
    groups: list[list[str]] = []
    for key in keys:
        same = next((keys for keys in groups if run.series[keys[0]] == run.series[key] and key.startswith(_LR)), None)
        if same is None:
            groups.append([key])
        else:
            same.append(key)
    return groups


def _std_band(run: RunSeries, key: str) -> Iterator[tuple[float, float, float]]:
    if not key.endswith(_MEAN):
        return
    deviations = dict(run.series.get(key.removesuffix(_MEAN) + _STD, []))
    for step, mean in run.series[key]:
        if step in deviations:
            yield step, mean - deviations[step], mean + deviations[step]


def _is_buffer(key: str) -> bool:
    return "/" in key and not key.startswith((_LR, *_NOT_BUFFERS))
