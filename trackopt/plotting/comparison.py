"""Compare runs: hyperparameters, results, steps and time to a target, spikes; no torch, no printing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trackopt.journal.columns import Series
from trackopt.plotting.run_series import RunSeries, display_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from trackopt.utils.types import JsonObject

WINDOW_STEPS = 50  # previous steps that define what is normal
_MIN_POINTS = 10  # with fewer previous points no step counts as a spike
_WINDOWS_AT_ONCE = 1 << 14
SPIKE_IQRS = 3  # interquartile ranges above the median: four standard deviations, if it is normal
_ALWAYS_SHOWN = ("optimizer", "scheduler", "lr")
_UPDATE, _RATIO = "update/", ".ratio"


@dataclass(frozen=True)
class Row:
    """One run of a comparison.

    Attributes:
        path: The path that the user gave.
        name: The name to display.
        status: ``finished``, ``failed`` or ``killed``; ``None`` while it runs.
        settings: Optimizer, scheduler and hyperparameters; a list where the parameter groups differ.
        steps: The last recorded step.
        final: The metric's last value.
        best: The metric's best finite value.
        best_step: The step of the best value.
        steps_to_target: The first step that reaches the target.
        seconds_to_target: Training time up to that step, without pauses between attempts.
        spikes: The share of steps at which the metric is not finite, or worse than the median of the previous 50 steps
            by more than three times their interquartile range.
        update_ratio: The median of ``update/….ratio`` over steps and parameter groups.
        step_ms: The median time between two records, in milliseconds.
    """

    path: str
    name: str
    status: str | None
    settings: dict[str, Any]
    steps: int
    final: float | None
    best: float | None
    best_step: int | None
    steps_to_target: int | None
    seconds_to_target: float | None
    spikes: float
    update_ratio: float | None
    step_ms: float | None


@dataclass(frozen=True)
class Comparison:
    """Compared runs, the best first.

    Attributes:
        metric: The series by which the runs are compared.
        highest: True if higher values are better.
        target: The value to reach; ``None`` if no run has a finite one.
        rows: One for each run.
    """

    metric: str
    highest: bool
    target: float | None
    rows: tuple[Row, ...]

    def settings_shown(self) -> list[str]:
        """List the settings to show: optimizer, scheduler and LR, and all others that differ between runs."""
        known = dict.fromkeys(label for row in self.rows for label in row.settings)
        values = {label: [row.settings[label] for row in self.rows if label in row.settings] for label in known}
        others = [label for label, each in values.items() if any(value != each[0] for value in each)]
        return [label for label in _ALWAYS_SHOWN if label in known] + [
            label for label in others if label not in _ALWAYS_SHOWN
        ]

    def as_dict(self) -> JsonObject:
        """Return the comparison as plain data."""
        return {
            "metric": self.metric,
            "better": "higher" if self.highest else "lower",
            "target": self.target,
            "runs": [asdict(row) for row in self.rows],
        }


def is_compared(key: str, metric: str) -> bool:
    """Return whether a comparison needs a series."""
    return key == metric or (key.startswith(_UPDATE) and key.endswith(_RATIO))


def compare(
    runs: Sequence[RunSeries], metric: str = "loss", *, target: float | None = None, highest: bool = False
) -> Comparison:
    """Compare runs by a metric.

    Args:
        runs: One or more runs.
        metric: The series to compare by.
        target: The value to reach. Default: the worst of the runs' best values, which every run reaches.
        highest: True if higher values of the metric are better.

    Example:
        >>> losses = {"a": [3.0, 1.0], "b": [2.0, 1.5]}
        >>> points = {name: {"loss": Series.of(list(enumerate(values, 1)))} for name, values in losses.items()}
        >>> seconds = Series.of([(1, 0.1), (2, 0.2)])
        >>> runs = [RunSeries(name, name, None, {}, points[name], seconds, frozenset()) for name in "ab"]
        >>> comparison = compare(runs)
        >>> comparison.target, [(row.name, row.best, row.steps_to_target) for row in comparison.rows]
        (1.5, [('a', 1.0, 2), ('b', 1.5, 2)])
    """
    sign = -1.0 if highest else 1.0
    bests = [_find_best(run.series.get(metric, Series.of([])), sign) for run in runs]
    if target is None:
        target = max((best[1] for best in bests if best), key=lambda value: sign * value, default=None)
    rows = [
        _build_row(run, name, metric, best, target, sign)
        for run, name, best in zip(runs, display_names(runs), bests, strict=True)
    ]
    rows.sort(key=lambda row: math.inf if row.best is None else sign * row.best)
    return Comparison(metric, highest, target, tuple(rows))


def _build_row(
    run: RunSeries, name: str, metric: str, best: tuple[int, float] | None, target: float | None, sign: float
) -> Row:
    points = run.series.get(metric, Series.of([]))
    target_step = None if target is None else _find_step(points, sign * points.values <= sign * target)
    ratios = [series.values for key, series in run.series.items() if key.startswith(_UPDATE)]
    times = run.seconds.values[run.seconds.values > 0]
    return Row(
        path=run.path,
        name=name,
        status=run.status,
        settings=_merge_groups(run.params),
        steps=run.steps,
        final=float(points.values[-1]) if len(points) else None,
        best=best and best[1],
        best_step=best and best[0],
        steps_to_target=target_step,
        seconds_to_target=None
        if target_step is None
        else math.fsum(run.seconds.values[run.seconds.steps <= target_step].tolist()),
        spikes=_spike_share(sign * points.values),
        update_ratio=float(np.median(np.concatenate(ratios))) if ratios else None,
        step_ms=1000 * float(np.median(times)) if len(times) else None,
    )


def _find_best(points: Series, sign: float) -> tuple[int, float] | None:
    if not np.isfinite(points.values).any():
        return None
    index = int(np.argmin(np.where(np.isfinite(points.values), sign * points.values, np.inf)))
    return int(points.steps[index]), float(points.values[index])


def _find_step(points: Series, condition: NDArray[np.bool_]) -> int | None:
    """Return the first step at which a condition holds."""
    return int(points.steps[np.argmax(condition)]) if condition.any() else None


def _spike_share(values: NDArray[np.float64]) -> float:
    """Return the share of values that exceed what the previous 50 make likely; lower values are better."""
    finite = values[np.isfinite(values)]
    spikes = len(values) - len(finite) + sum(map(_count_spikes, _list_windows(finite)))
    return spikes / len(values) if len(values) else 0.0


def _list_windows(values: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield tables whose rows are the values before one and that value: the last 50, fewer at the beginning."""
    for end in range(_MIN_POINTS, min(WINDOW_STEPS, len(values))):
        yield values[None, : end + 1]
    if len(values) > WINDOW_STEPS:
        windows = np.lib.stride_tricks.sliding_window_view(values, WINDOW_STEPS + 1)
        for start in range(0, len(windows), _WINDOWS_AT_ONCE):
            yield windows[start : start + _WINDOWS_AT_ONCE]


def _count_spikes(windows: NDArray[np.float64]) -> int:
    """Count the rows whose last value is far above the others."""
    count = windows.shape[1] - 1
    quarters = [count * quarter // 4 for quarter in (1, 2, 3)]
    low, median, high = np.partition(windows[:, :-1], quarters, axis=1)[:, quarters].T
    with np.errstate(over="ignore"):  # of the largest floats
        return int(np.sum(windows[:, -1] > median + SPIKE_IQRS * (high - low) + 1e-9 * np.abs(median)))


def _merge_groups(params: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the parameter groups' hyperparameters: one value where all agree, else a list."""
    classes = {key for key in params if "." not in key}
    values: dict[str, list[Any]] = {}
    for key, value in params.items():
        first, _, rest = key.partition(".")
        last = rest.rpartition(".")[2]
        label = key if not rest else f"{first}.{last}" if first in classes else last
        values.setdefault(label, []).append(value)
    return {label: each[0] if all(value == each[0] for value in each) else each for label, each in values.items()}
