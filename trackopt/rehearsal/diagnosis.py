"""The likely cause of a difference between two trainings, derived from the inputs of each step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.rehearsal import divergence

if TYPE_CHECKING:
    from trackopt.rehearsal.divergence import Divergence
    from trackopt.rehearsal.trace import Step, Trace

_ROUNDING = 1e-6  # kernels that sum in another order differ by less, relative to the value
_MAX_NAMES = 3
LIBRARIES = {"python": "random", "numpy": "NumPy", "torch": "torch", "cuda": "torch (CUDA)"}
_SEEDS = {
    "python": "random.seed(0)",
    "numpy": "np.random.seed(0)",
    "torch": "torch.manual_seed(0)",
    "cuda": "torch.manual_seed(0)",
}
_SEEDED = {
    "NumPy's Generator": "np.random.default_rng(0)",
    "NumPy's RandomState": "np.random.RandomState(0)",
    "torch.Generator": "torch.Generator().manual_seed(0)",
    "random.Random": "random.Random(0)",
}


@dataclass(frozen=True)
class Cause:
    """Why two trainings diverge.

    Attributes:
        kind: ``data``, ``lr``, ``rng``, ``weights``, ``optimizer``, ``accumulation``, ``object``, ``number``,
            ``length``, ``kernels``, ``state``, ``directory`` or ``unknown``.
        observation: The observed difference.
        advice: How to fix it.
    """

    kind: str
    observation: str
    advice: str

    def as_dict(self) -> dict[str, str]:
        """Return the attributes under the keys of ``rehearse --json``."""
        return {"kind": self.kind, "seen": self.observation, "advice": self.advice}


@dataclass(frozen=True)
class Diagnosis:
    """Why a rehearsal was not exact.

    Attributes:
        reproducible: True if two uninterrupted trainings were identical. If not, ``first`` is where these two diverge.
        first: The first difference; ``None`` if there is nothing to compare.
        cause: The likely cause.
    """

    reproducible: bool
    first: Divergence | None
    cause: Cause


def diagnose(a: Trace, b: Trace, control: Trace | None = None) -> Diagnosis | None:
    """Find the first difference of two trainings of one run, and its cause; ``None`` if every step was identical.

    Args:
        a: An uninterrupted training.
        b: A training that was killed and resumed; without ``control``, a second uninterrupted training.
        control: A second uninterrupted training that is identical to ``a``.
    """
    first = divergence.first_divergence(a, b)
    if first is None:
        return None
    return Diagnosis(control is not None, first, _Comparison(a, b, first, control).cause())


class _Comparison:
    """Two trainings and the step at which they diverge; candidates are checked in the order of cause and effect."""

    def __init__(self, a: Trace, b: Trace, first: Divergence, control: Trace | None) -> None:
        self._traces = (a, b)
        self._first = first
        self._step = first.step or 0
        self._resumed = control is not None
        self._previous = max((step for step in a.steps if step < self._step), default=0)
        self._restored = next((start for start in reversed(b.attempts) if start.step == self._previous), None)
        common = a.steps.keys() & b.steps.keys()
        self._parts = divergence.differing_parts(a, b, self._step) if self._step in common else set()
        at = self._step if self._step in common else max(common, default=0)
        self._steps: tuple[Step, Step] | None = (a.steps[at], b.steps[at]) if at else None
        self._control = control.steps.get(at) if control else None

    def cause(self) -> Cause:
        """Return the likely cause."""
        checks = (self._length, self._weights, self._data, self._learning_rate, self._rng, self._untracked_state)
        return next(filter(None, (check() for check in checks)), None) or self._unknown()

    def _length(self) -> Cause | None:
        a, b = (max(trace.steps, default=0) for trace in self._traces)
        if self._parts or a == b or self._step <= min(a, b):
            return None
        seen = f"one training ended at step {a:,}, the other at step {b:,}"
        if not self._resumed:
            return Cause("length", seen, "make its length depend on steps or epochs, not on time")
        seen += "".join(f"; {number}" for number in self._numbers())
        return Cause(
            "length",
            seen,
            "take epochs and batches from run.epochs(n) and run.batches(loader), or start the loop at run.global_step",
        )

    def _weights(self) -> Cause | None:
        a = self._traces[0]
        before = a.steps[self._previous] if self._previous else a.attempts[0]
        if self._restored is None or self._restored.weights == before.weights:
            return None
        if not self._resumed:
            return Cause(
                "weights",
                "the weights differ before the first step",
                f"seed before the model is made: {_SEEDS['torch']}",
            )
        models = self._changed("module")
        seen = f"training resumed with other weights than those of step {self._previous:,}"
        if models:
            return Cause(
                "weights",
                f"{seen}: {self._describe(models)} not handed to wrap()",
                _hand_over(models),
            )
        return Cause("weights", seen, "hand the model to wrap(…, model=model), and do not change it afterwards")

    def _data(self) -> Cause | None:
        if "batch" not in self._parts:
            return None
        seen = "the batch was not the same"
        if self._step > 1 or self._resumed:
            seen = f"the weights at step {self._previous:,} were identical, the batch of step {self._step:,} was not"
        if self._resumed:
            seen += ": the data are not restored"
            if found := self._object("generator", "stateful"):
                return Cause("data", f"{seen}; {found.observation}", found.advice)
            seen += "".join(f"; {number}" for number in self._numbers())
            return Cause(
                "data",
                f"{seen}, so the loader draws from something that trackopt does not know",
                "let it draw from a generator that is created once, and hand that over: trackopt.wrap(…, rng=rng)",
            )
        if found := self._unseeded():
            return Cause("data", f"{seen}: {found.observation}", found.advice)
        return Cause(
            "data",
            f"{seen}: the order depends on something that is different each time, such as the time, the system's "
            "entropy or the order of a set",
            "seed the generator of the sampler",
        )

    def _learning_rate(self) -> Cause | None:
        used = (self._first.series or "").startswith("lr/")
        if not used and self._parts != {"lr"}:
            return None
        seen = "the learning rate differs first"
        if not self._resumed:
            return Cause(
                "lr", f"{seen}: it depends on something that is different each time", "compute it from the step"
            )
        if schedulers := self._changed("scheduler"):
            name = schedulers[0]
            restart = "they start again" if len(schedulers) > 1 else "it starts again"
            return Cause(
                "lr",
                f"{seen}: {self._describe(schedulers)} not handed to wrap(), so {restart} after a resume",
                f"hand it over: trackopt.wrap(optimizer, {name}, …)",
            )
        seen += "".join(f"; {number}" for number in self._numbers())
        return Cause(
            "lr",
            f"{seen}: the script sets it without a scheduler",
            "compute it from run.global_step or run.epoch, or use a scheduler and hand it to wrap()",
        )

    def _rng(self) -> Cause | None:
        if "rng" not in self._parts or self._steps is None:
            return None
        if not self._resumed and (found := self._unseeded()):
            return found
        names = divergence.changed_generators(*self._traces, *(step.before["rng"] for step in self._steps))
        if not names:
            return None  # the step drew more or fewer numbers for another reason
        libraries = " and ".join(LIBRARIES[name] for name in names)
        return Cause(
            "rng",
            f"the global generator of {libraries} was in another state when step {self._step:,} began",
            "train inside `for epoch in run.epochs(n)`, which restores it; do not seed or draw by the time",
        )

    def _untracked_state(self) -> Cause | None:
        if not self._resumed:
            return self._unseeded()
        seen = f"step {self._step:,} began with the same weights, batch and global generators"
        if found := self._object("generator"):
            return Cause("object", f"{seen}; {found.observation}", found.advice)
        found, numbers = self._object("scheduler", "optimizer", "stateful", "module"), self._numbers()
        if found or numbers:
            known = "keep it in an object with state_dict() and load_state_dict(), and hand that to wrap()"
            observations = [part for part in (found and found.observation, *numbers) if part]
            advice = [part for part in (found and found.advice, numbers and known) if part]
            return Cause("object" if found else "number", f"{seen}; {'; '.join(observations)}", "; ".join(advice))
        if self._restored is not None and self._steps is not None and self._steps[0].batch is None:
            return Cause(
                "data",
                "the loop does not take its data from run.batches(), so their order is not restored",
                "take the batches from run.batches(loader)",
            )
        if self._restored is not None and (names := self._all("iterator")):
            return Cause(
                "object",
                f"{seen}; {self._describe(names)} in the middle of its data, and starts again after a resume",
                "create the iterator in each epoch, or take its batches from run.batches(loader)",
            )
        return None

    def _unknown(self) -> Cause:
        a, b = self._first.a, self._first.b
        if self._first.series is None or (
            a is not None and b is not None and abs(a - b) <= _ROUNDING * max(abs(a), abs(b))
        ):
            return Cause(
                "kernels",
                "all inputs of the step were identical, and the results differ by no more than rounding: some "
                "kernel sums in another order each time",
                "torch.use_deterministic_algorithms(True)",
            )
        return Cause(
            "unknown",
            "all inputs of the step that trackopt sees were identical: it depends on something else, such as a file, "
            "the time or an object without a state_dict()",
            "look for what the step reads besides its batch",
        )

    def _unseeded(self) -> Cause | None:
        """Find the generator that was not seeded, between two uninterrupted trainings."""
        untracked = self._traces[1].untracked
        if names := self._changed("generator", "loader"):
            own = [name for name in names if untracked[name]["kind"] == "generator"]
            advice = f"seed it: {_SEEDED[untracked[names[0]]['label']]}" + (f"; and {_hand_over(own)}" if own else "")
            return Cause("object", f"{self._describe(names)} not seeded", advice)
        if self._steps is None:
            return None
        names = divergence.changed_generators(*self._traces, *(step.before["rng"] for step in self._steps))
        if not names:
            return None
        libraries = " and ".join(LIBRARIES[name] for name in names)
        return Cause(
            "rng", f"the global generator of {libraries} is not seeded", "; ".join(_SEEDS[name] for name in names)
        )

    def _object(self, *kinds: str) -> Cause | None:
        names = self._changed(*kinds)
        if not names:
            return None
        return Cause("object", f"{self._describe(names)} not known to trackopt", _hand_over(names))

    def _changed(self, *kinds: str) -> list[str]:
        """Return the untracked objects of these kinds whose state differed when the step began."""
        return [name for name in self._all(*kinds) if name in self._changed_inputs("untracked")]

    def _all(self, *kinds: str) -> list[str]:
        return [name for name, about in self._traces[1].untracked.items() if about["kind"] in kinds]

    def _numbers(self) -> list[str]:
        """Describe the user's own numbers that differed when the step began."""
        changed = list(self._changed_inputs("numbers").items())[:_MAX_NAMES]
        return [f"`{name}` was {a} in the one and {b} in the other" for name, (a, b) in changed]

    def _changed_inputs(self, what: str) -> dict[str, tuple[Any, Any]]:
        """Return the inputs of the step that differed, except those that differ in every training."""
        if self._steps is None:
            return {}
        a, b = (step.before[what] for step in self._steps)
        expected = a if self._control is None else self._control.before[what]
        return {
            name: (a[name], b[name]) for name in a if name in b and a[name] != b[name] and a[name] == expected.get(name)
        }

    def _describe(self, names: list[str]) -> str:
        """Join names and verb: ``NumPy's Generator `noise` is``, ``Adam `a` and SGD `b` are``."""
        parts = [f"{self._traces[1].untracked[name]['label']} `{name}`" for name in names[:_MAX_NAMES]]
        return f"{' and '.join(parts)} {'are' if len(names) > 1 else 'is'}"


def _hand_over(names: list[str]) -> str:
    arguments = [
        f"{re.findall(r'[A-Za-z_]+[A-Za-z_0-9]*', name)[-1]}={_expression(name)}" for name in names[:_MAX_NAMES]
    ]
    return f"hand {'them' if len(names) > 1 else 'it'} over: trackopt.wrap(…, {', '.join(arguments)})"


def _expression(name: str) -> str:
    closure = re.search(r"\(…(\w+)…\)$", name)
    return closure.group(1) if closure else name
