"""Compare runs: hyperparameters, results, steps and time to a target, spikes; no torch, no printing."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trackopt.plotting.run_series import RunSeries, display_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trackopt.utils.types import JsonObject

WINDOW_STEPS = 50  # previous steps that define what is normal
_MIN_POINTS = 10  # with fewer previous points no step counts as a spike
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
        >>> points = {name: {"loss": list(enumerate(values, 1))} for name, values in losses.items()}
        >>> runs = [RunSeries(name, name, None, {}, points[name], [(1, 0.1), (2, 0.2)], frozenset()) for name in "ab"]
        >>> comparison = compare(runs)
        >>> comparison.target, [(row.name, row.best, row.steps_to_target) for row in comparison.rows]
        (1.5, [('a', 1.0, 2), ('b', 1.5, 2)])
    """
    sign = -1.0 if highest else 1.0
    bests = [_find_best(run.series.get(metric, []), sign) for run in runs]
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
    points = run.series.get(metric, [])
    target_step = next((step for step, value in points if target is not None and sign * value <= sign * target), None)
    ratios = [value for key, series in run.series.items() if key.startswith(_UPDATE) for _, value in series]
    times = [seconds for _, seconds in run.seconds if seconds > 0]
    return Row(
        path=run.path,
        name=name,
        status=run.status,
        settings=_merge_groups(run.params),
        steps=run.steps,
        final=points[-1][1] if points else None,
        best=best and best[1],
        best_step=best and best[0],
        steps_to_target=target_step,
        seconds_to_target=None
        if target_step is None
        else math.fsum(t for step, t in run.seconds if step <= target_step),
        spikes=_spike_share([sign * value for _, value in points]),
        update_ratio=statistics.median(ratios) if ratios else None,
        step_ms=1000 * statistics.median(times) if times else None,
    )


def _find_best(points: Sequence[tuple[int, float]], sign: float) -> tuple[int, float] | None:
    finite = [point for point in points if math.isfinite(point[1])]
    return min(finite, key=lambda point: sign * point[1], default=None)


def _spike_share(values: Sequence[float]) -> float:
    """Return the share of values that exceed what the previous 50 make likely; lower values are better."""
    return sum(_find_spikes(values)) / len(values) if values else 0.0


def _find_spikes(values: Sequence[float]) -> Iterator[bool]:
    recent: deque[float] = deque()
    ordered: list[float] = []
    for value in values:
        if not math.isfinite(value):
            yield True
            continue
        if len(ordered) >= _MIN_POINTS:
            low, median, high = (ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3))
            yield value > median + SPIKE_IQRS * (high - low) + 1e-9 * abs(median)
        recent.append(value)
        insort(ordered, value)
        if len(recent) > WINDOW_STEPS:
            del ordered[bisect_left(ordered, recent.popleft())]


def _merge_groups(params: dict[str, Any]) -> dict[str, Any]:
    """Merge the parameter groups' hyperparameters: one value where all agree, else a list."""
    classes = {key for key in params if "." not in key}
    values: dict[str, list[Any]] = {}
    for key, value in params.items():
        first, _, rest = key.partition(".")
        last = rest.rpartition(".")[2]
        label = key if not rest else f"{first}.{last}" if first in classes else last
        values.setdefault(label, []).append(value)
    return {label: each[0] if all(value == each[0] for value in each) else each for label, each in values.items()}
