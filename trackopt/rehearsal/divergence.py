"""The first step at which two trainings that should be identical diverge, and the differences there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trackopt.rehearsal.trace import Step, Trace

_DIGITS = 8  # of one tensor's fingerprint


@dataclass(frozen=True)
class Divergence:
    """The first difference between two trainings.

    Attributes:
        run: The run's name.
        step: The optimizer step; ``None`` if every step was identical and only the final checkpoint differs.
        series: The series that differs at that step, if any.
        a: Its value in the first training; ``None`` if it has none.
        b: Its value in the second.
        tensor: The first tensor of the weights, the optimizer's state or the tracked objects that differs after that
            step, or the entry that differs in the final checkpoint.
    """

    run: str
    step: int | None
    series: str | None = None
    a: float | None = None
    b: float | None = None
    tensor: str | None = None


def first_divergence(a: Trace, b: Trace) -> Divergence | None:
    """Find the first step at which a series, the weights, the optimizer's state or their inputs differ.

    A learning rate that was changed after a step differs in the series of the next step, which used it.
    """
    points = list(differing_points(a, b))
    differing = {step: differing_parts(a, b, step) for step in a.steps.keys() & b.steps.keys()}
    steps = {step for step, *_ in points} | a.steps.keys() ^ b.steps.keys()
    steps |= {step for step, parts in differing.items() if parts - {"lr"}}
    steps = steps or {step for step, parts in differing.items() if parts}
    if not steps:
        return None
    step = min(steps)
    tensor = next(differing_names(a, a.steps[step], b.steps[step]), None) if step in differing else None
    candidates = sorted((point for point in points if point[0] == step), key=lambda point: _rank(point[1]))
    _, series, x, y = candidates[0] if candidates else (step, None, None, None)
    return Divergence(a.name, step, series, x, y, tensor)


def relative_difference(a: Trace, b: Trace, until: int) -> float | None:
    """Return the largest difference, relative to the value, of the first points that differ; ``None`` without a pair.

    The user's metrics count if one of them differs there: statistics near zero differ by more than rounding.

    Args:
        a: A training.
        b: Another one.
        until: The last step that counts.
    """
    points = [(step, key, x, y) for step, key, x, y in differing_points(a, b) if step <= until and x != y]
    first = min((step for step, *_ in points), default=None)
    points = sorted((point for point in points if point[0] == first), key=lambda point: _rank(point[1]))
    pairs = [(x, y) for _, key, x, y in points if _rank(key) == _rank(points[0][1])]
    differences = [float("inf") if x is None or y is None else abs(x - y) / max(abs(x), abs(y)) for x, y in pairs]
    return max(differences, default=None)


def same_series(a: Trace, b: Trace) -> bool:
    """Return True if the effective series are identical in every bit; NaN equals NaN."""
    return next(differing_points(a, b), None) is None


def differing_parts(a: Trace, b: Trace, step: int) -> set[str]:
    """Return the attributes of `Step` that differ at a step, among those that determine the next one."""
    x, y = a.steps[step], b.steps[step]
    names = ("batch", "weights", "optimizer", "lr", "objects")
    parts = {name for name in names if getattr(x, name) != getattr(y, name)}
    return parts | ({"rng"} if changed_generators(a, b, x.rng, y.rng) else set())


def changed_generators(a: Trace, b: Trace, x: Mapping[str, int], y: Mapping[str, int]) -> list[str]:
    """Return the global generators whose states differ, ignoring generators that neither training drew from."""
    unused = unused_generators(a) & unused_generators(b)
    return [name for name in x if name not in unused and x[name] != y.get(name)]


def unused_generators(trace: Trace) -> set[str]:
    """Return the global generators that nothing drew from in the whole training."""
    states = [state for step in trace.steps.values() for state in (step.before["rng"], step.rng)]
    return {name for name in (states[0] if states else ()) if len({state.get(name) for state in states}) == 1}


def differing_points(a: Trace, b: Trace) -> Iterator[tuple[int, str, float | None, float | None]]:
    """Yield every differing point of the series: step, key, and both values."""
    for key in dict.fromkeys((*a.series, *b.series)):
        xs, ys = dict(a.series.get(key, ())), dict(b.series.get(key, ()))
        for step in xs.keys() | ys.keys():
            x, y = xs.get(step), ys.get(step)
            if repr(x) != repr(y):  # -0.0 differs from 0.0, NaN does not differ from NaN
                yield step, key, x, y


def _rank(key: str) -> tuple[bool, bool]:
    """Sort learning rates before their effects, and the user's metrics before statistics."""
    return not key.startswith("lr/"), "/" in key


def differing_names(trace: Trace, a: Step, b: Step) -> Iterator[str]:
    """Yield what differs after a step: tensors of the weights, the optimizer's states, entries of tracked objects."""
    for what in ("weights", "optimizer", "objects"):
        for name in differing_entries(trace.names.get(what, ()), getattr(a, what), getattr(b, what)):
            yield f"the optimizer's state of {name}" if what == "optimizer" else name


def differing_entries(names: Iterable[str], x: str, y: str) -> Iterator[str]:
    """Yield the names whose fingerprints differ, in two texts with eight digits for each name."""
    for index, name in enumerate(names):
        at = slice(index * _DIGITS, (index + 1) * _DIGITS)
        if x[at] != y[at]:
            yield name
