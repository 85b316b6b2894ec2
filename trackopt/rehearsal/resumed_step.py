"""The step of a resumed training that differs from that of the uninterrupted one, and what it began with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trackopt.rehearsal.candidates import FINGERPRINT, describe_pair
from trackopt.rehearsal.divergence import changed_generators

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.rehearsal.trace import AttemptStart, Step, Trace

_MAX_NAMES = 3


class ResumedStep:
    """The first step that differs, in both trainings.

    Args:
        a: An uninterrupted training.
        b: A training that was killed and resumed.
        step: The step, which both have made.
        control: A second uninterrupted training: what differs there as well is no evidence.

    Attributes:
        a: As given.
        b: As given.
        number: The step's number.
        steps: The step in both trainings.
        start: The attempt that made it in ``b``.
    """

    def __init__(self, a: Trace, b: Trace, step: int, control: Trace | None) -> None:
        self.a, self.b, self.number = a, b, step
        self.steps: tuple[Step, Step] = (a.steps[step], b.steps[step])
        self.start = attempt_of(b, step)
        self._control = control.steps.get(step) if control else None

    @property
    def more_steps(self) -> int:
        """How many more steps the resumed training made in all."""
        return max(self.b.steps) - max(self.a.steps)

    def generators(self) -> list[str]:
        """Return the global generators that were in another state when the step began."""
        x, y = self.steps
        return changed_generators(self.a, self.b, x.before["rng"], y.before["rng"])

    def objects(self, *kinds: str) -> list[str]:
        """Return the objects of these kinds whose state differed; of several names for one, the last."""
        about = self.b.untracked
        pairs = {(a, b): name for name, a, b in self._changed("untracked") if about[name]["kind"] in kinds}
        return list(pairs.values())

    def label(self, name: str) -> str:
        """Return an object's class and name."""
        return f"{self.b.untracked[name]['label']} `{name}`"

    def values(self, *, tensors: bool = True) -> list[str]:
        """Describe the variables that differed, without tensors where the batch is one of them."""
        changed = [pair for pair in self._changed("values") if tensors or FINGERPRINT not in pair[1]]
        return [describe_pair(*pair) for pair in changed][:_MAX_NAMES]

    def _changed(self, what: str) -> Iterator[tuple[str, Any, Any]]:
        a, b = (step.before[what] for step in self.steps)
        expected = a if self._control is None else self._control.before[what]
        for name in a:
            if name in b and a[name] != b[name] and a[name] == expected.get(name) and self._varies(what, name):
                yield name, a[name], b[name]

    def _varies(self, what: str, name: str) -> bool:
        """Return whether it changes in an uninterrupted training; if not, it is a setting, such as the first epoch."""
        return len({step.before[what].get(name) for step in self.a.steps.values()}) > 1


def attempt_of(trace: Trace, step: int) -> AttemptStart:
    """Return the start of the attempt that made a step."""
    return next((start for start in reversed(trace.attempts) if start.step < step), trace.attempts[0])
