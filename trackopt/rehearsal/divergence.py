"""Where two trainings that should be the same part: the first step, and what differs there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.rehearsal.trace import Step, Trace

_DIGITS = 8  # of one tensor's fingerprint


@dataclass(frozen=True)
class Divergence:
    """The first difference between two trainings.

    Attributes:
        run: The run's name.
        step: The optimizer step; ``None`` where every step was the same and only the final checkpoint differs.
        series: The series that differs at that step, if one does.
        a: Its value in the first training; ``None`` if there is none.
        b: Its value in the second.
        tensor: The first tensor of the weights or the optimizer's state that differs after that step; or the entry
            that differs in the final checkpoint.
    """

    run: str
    step: int | None
    series: str | None = None
    a: float | None = None
    b: float | None = None
    tensor: str | None = None


def first_divergence(a: Trace, b: Trace) -> Divergence | None:
    """The earliest step at which a series, the weights, the optimizer's state or what made them differs.

    A learning rate that was changed behind a step differs in the series of the next one, which used it.
    """
    points = list(_points(a, b))
    other = {step: differing_parts(a, b, step) for step in a.steps.keys() & b.steps.keys()}
    steps = {step for step, *_ in points} | a.steps.keys() ^ b.steps.keys()
    steps |= {step for step, found in other.items() if found - {"lr"}}
    steps = steps or {step for step, found in other.items() if found}
    if not steps:
        return None
    step = min(steps)
    both = step in other
    tensor = _tensor(a, a.steps[step], b.steps[step]) if both else None
    here = sorted((point for point in points if point[0] == step), key=lambda point: _rank(point[1]))
    _, series, x, y = here[0] if here else (step, None, None, None)
    return Divergence(a.name, step, series, x, y, tensor)


def same_series(a: Trace, b: Trace) -> bool:
    """Whether the effective series agree in every bit; NaN agrees with NaN."""
    return next(_points(a, b), None) is None


def differing_parts(a: Trace, b: Trace, step: int) -> set[str]:
    """What differs at a step, of what decides how training goes on: names of `Step`'s attributes."""
    one, other = a.steps[step], b.steps[step]
    found = {name for name in ("batch", "weights", "optimizer", "lr") if getattr(one, name) != getattr(other, name)}
    return found | ({"rng"} if changed_generators(a, b, one.rng, other.rng) else set())


def changed_generators(a: Trace, b: Trace, one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    """The global generators that stand elsewhere, of those that something draws from."""
    still = unchanged_steps(a) & unchanged_steps(b)
    return [name for name in one if name not in still and one[name] != other.get(name)]


def unchanged_steps(trace: Trace) -> set[str]:
    """The global generators that nothing drew from in the whole training."""
    states = [state for step in trace.steps.values() for state in (step.before["rng"], step.rng)]
    return {name for name in (states[0] if states else ()) if len({state.get(name) for state in states}) == 1}


def _points(a: Trace, b: Trace) -> Iterator[tuple[int, str, float | None, float | None]]:
    """Every point of the series that differs: step, key, and both values."""
    for key in dict.fromkeys((*a.series, *b.series)):
        one, other = dict(a.series.get(key, ())), dict(b.series.get(key, ()))
        for step in one.keys() | other.keys():
            x, y = one.get(step), other.get(step)
            if repr(x) != repr(y):  # tells -0.0 from 0.0, and not NaN from NaN
                yield step, key, x, y


def _rank(key: str) -> tuple[bool, bool]:
    """A learning rate comes before what it leads to, and what the user logged before statistics."""
    return not key.startswith("lr/"), "/" in key


def _tensor(trace: Trace, one: Step, other: Step) -> str | None:
    for what in ("weights", "optimizer"):
        x, y = getattr(one, what), getattr(other, what)
        for index, name in enumerate(trace.names[what]):
            at = slice(index * _DIGITS, (index + 1) * _DIGITS)
            if x[at] != y[at]:
                return name if what == "weights" else f"the optimizer's state of {name}"
    return None
