"""Runs side by side: what each was given, what came of it, how soon and how steadily; no torch, no printing."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trackopt.plotting.run_series import RunSeries, names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WINDOW = 50  # steps before one, against which it is judged
_MIN_POINTS = 10  # of them, below which nothing is judged
SPIKE_IQRS = 3  # interquartile ranges above the median: four standard deviations, if it is normal
_ALWAYS = ("optimizer", "scheduler", "lr")
_UPDATE, _RATIO = "update/", ".ratio"


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        path: As it was named.
        name: What it is called.
        status: ``finished``, ``failed`` or ``killed``; ``None`` while it goes on.
        settings: Optimizer, scheduler and hyperparameters; a list where the parameter groups differ.
        steps: The last step that was recorded.
        final: The metric's last value.
        best: Its best finite value.
        best_step: Where that was.
        steps_to_target: The first step at which the target was reached.
        seconds_to_target: How long the training took until then, without pauses between attempts.
        spikes: The share of steps at which the metric is not finite, or worse than the median of the 50 steps before
            by more than three times their interquartile range.
        update_ratio: The median of ``update/….ratio`` over steps and parameter groups.
        step_ms: The median time of a step, in milliseconds, from one record to the next.
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
    """Runs, the best first.

    Attributes:
        metric: The series that they are compared by.
        highest: Whether more is better.
        target: The value to reach; ``None`` if no run has a finite one.
        rows: One for each run.
    """

    metric: str
    highest: bool
    target: float | None
    rows: tuple[Row, ...]

    def differing(self) -> list[str]:
        """The settings to show: optimizer, scheduler and LR, and others that are not the same in all runs."""
        known = dict.fromkeys(label for row in self.rows for label in row.settings)
        values = {label: [row.settings[label] for row in self.rows if label in row.settings] for label in known}
        others = [label for label, each in values.items() if any(value != each[0] for value in each)]
        return [label for label in _ALWAYS if label in known] + [label for label in others if label not in _ALWAYS]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "metric": self.metric,
            "better": "higher" if self.highest else "lower",
            "target": self.target,
            "runs": [asdict(row) for row in self.rows],
        }


def wanted(key: str, metric: str) -> bool:
    """Whether a comparison needs a series."""
    return key == metric or (key.startswith(_UPDATE) and key.endswith(_RATIO))


def compare(
    runs: Sequence[RunSeries], metric: str = "loss", *, target: float | None = None, highest: bool = False
) -> Comparison:
    """Compare runs by a metric.

    Args:
        runs: Two or more, or one.
        metric: The series.
        target: The value whose step and time are told. Default: the worst of the runs' best, which all of them reach.
        highest: Whether more of the metric is better.

    Example:
        >>> losses = {"a": [3.0, 1.0], "b": [2.0, 1.5]}
        >>> points = {name: {"loss": list(enumerate(values, 1))} for name, values in losses.items()}
        >>> runs = [Tracked(name, name, None, {}, points[name], [(1, 0.1), (2, 0.2)], frozenset()) for name in "ab"]
        >>> found = compare(runs)
        >>> found.target, [(row.name, row.best, row.steps_to_target) for row in found.rows]
        (1.5, [('a', 1.0, 2), ('b', 1.5, 2)])
    """
    sign = -1.0 if highest else 1.0
    bests = [_best(run.series.get(metric, []), sign) for run in runs]
    if target is None:
        target = max((best[1] for best in bests if best), key=lambda value: sign * value, default=None)
    rows = [
        _row(run, name, metric, best, target, sign) for run, name, best in zip(runs, names(runs), bests, strict=True)
    ]
    rows.sort(key=lambda row: math.inf if row.best is None else sign * row.best)
    return Comparison(metric, highest, target, tuple(rows))


def _row(
    run: RunSeries, name: str, metric: str, best: tuple[int, float] | None, target: float | None, sign: float
) -> Row:
    points = run.series.get(metric, [])
    reached = next((step for step, value in points if target is not None and sign * value <= sign * target), None)
    ratios = [value for key, series in run.series.items() if key.startswith(_UPDATE) for _, value in series]
    times = [seconds for _, seconds in run.seconds if seconds > 0]
    return Row(
        path=run.path,
        name=name,
        status=run.status,
        settings=_settings(run.params),
        steps=run.steps,
        final=points[-1][1] if points else None,
        best=best and best[1],
        best_step=best and best[0],
        steps_to_target=reached,
        seconds_to_target=None if reached is None else math.fsum(t for step, t in run.seconds if step <= reached),
        spikes=_spikes([sign * value for _, value in points]),
        update_ratio=statistics.median(ratios) if ratios else None,
        step_ms=1000 * statistics.median(times) if times else None,
    )


def _best(points: Sequence[tuple[int, float]], sign: float) -> tuple[int, float] | None:
    finite = [point for point in points if math.isfinite(point[1])]
    return min(finite, key=lambda point: sign * point[1], default=None)


def _spikes(values: Sequence[float]) -> float:
    """The share of values that stand out from the 50 before them, the lower being the better."""
    return sum(_outliers(values)) / len(values) if values else 0.0


def _outliers(values: Sequence[float]) -> Iterator[bool]:
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
        if len(recent) > WINDOW:
            del ordered[bisect_left(ordered, recent.popleft())]


def _settings(params: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters with one entry for all parameter groups; a list where they differ."""
    classes = {key for key in params if "." not in key}
    gathered: dict[str, list[Any]] = {}
    for key, value in params.items():
        first, _, rest = key.partition(".")
        last = rest.rpartition(".")[2]
        label = key if not rest else f"{first}.{last}" if first in classes else last
        gathered.setdefault(label, []).append(value)
    return {label: each[0] if all(value == each[0] for value in each) else each for label, each in gathered.items()}
