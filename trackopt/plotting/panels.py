"""Build panels from runs: choose the series of each panel and the bands around the curves."""

from __future__ import annotations

from collections import defaultdict
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from trackopt.journal.columns import Series
from trackopt.plotting.downsampling import downsample_band, downsample_series
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
        >>> values = {"loss": 0.5, "exp_avg/group0.mean": 0.0, "exp_avg/group0.std": 0.2}
        >>> series = {key: Series.of([(1, value)]) for key, value in values.items()}
        >>> run = RunSeries("runs/a", "a", None, {}, series, Series.of([]), frozenset(series))
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
    runs_points = [_last_of_each_step(run.series.get(key, Series.of([]))) for run in runs]
    steps = reduce(np.intersect1d, [points.steps for points in runs_points])
    values = np.array([points.values[np.searchsorted(points.steps, steps)] for points in runs_points])
    with np.errstate(invalid="ignore", over="ignore"):  # infinite values have no mean
        means, deviations = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(runs) - 1))
        band = downsample_band(steps, means - deviations, means + deviations)
    return Curve(name, downsample_series(Series(steps, means)), band)


def _last_of_each_step(points: Series) -> Series:
    steps, last = np.unique(points.steps[::-1], return_index=True)
    return Series(steps, points.values[::-1][last])


def _build_panel(title: str, runs: Sequence[RunSeries], keys: dict[str, str]) -> Panel:
    """Draw one curve per run and series; the values of ``keys`` label the series."""
    curves = []
    for run, name in zip(runs, display_names(runs), strict=True):
        present = [key for key in keys if key in run.series]
        for same in _group_equal(run, present):
            groups = "" if len(same) == len(present) else ", ".join(keys[key] for key in same)
            label = " ".join(filter(None, [name if len(runs) > 1 else "", groups]))
            curves.append(Curve(label, downsample_series(run.series[same[0]]), _std_band(run, same[0])))
    if len(curves) == 1 < len(runs):
        title = f"{title} ({curves[0].name})"  # a single curve has no legend that names its run
    if len(curves) > _MAX_CURVES:
        title, curves = f"{title} ({_MAX_CURVES} of {len(curves)})", curves[:_MAX_CURVES]
    return Panel(title, tuple(curves))


def _group_equal(run: RunSeries, keys: Sequence[str]) -> list[list[str]]:
    """Group the keys whose LRs are equal; they share one curve."""
    groups: list[list[str]] = []
    for key in keys:
        same = next((keys for keys in groups if key.startswith(_LR) and _is_equal(run, keys[0], key)), None)
        if same is None:
            groups.append([key])
        else:
            same.append(key)
    return groups


def _is_equal(run: RunSeries, key: str, other: str) -> bool:
    one, two = run.series[key], run.series[other]
    return np.array_equal(one.steps, two.steps) and np.array_equal(one.values, two.values)


def _std_band(run: RunSeries, key: str) -> list[tuple[float, float, float]]:
    deviation_key = key.removesuffix(_MEAN) + _STD
    if not key.endswith(_MEAN) or deviation_key not in run.series:
        return []
    means, deviations = run.series[key], run.series[deviation_key]
    if not np.array_equal(means.steps, deviations.steps):
        deviations = _last_of_each_step(deviations)
        positions = np.searchsorted(deviations.steps, means.steps)
        found = np.append(deviations.steps, np.iinfo(np.int64).min)[positions] == means.steps
        means = Series(means.steps[found], means.values[found])
        deviations = Series(means.steps, deviations.values[positions[found]])
    with np.errstate(invalid="ignore", over="ignore"):  # infinite values have no band
        lows, highs = means.values - deviations.values, means.values + deviations.values
    return downsample_band(means.steps, lows, highs)


def _is_buffer(key: str) -> bool:
    return "/" in key and not key.startswith((_LR, *_NOT_BUFFERS))
