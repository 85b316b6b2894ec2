"""The likely cause of a difference between two trainings, told from what each step came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.rehearsal import divergence

if TYPE_CHECKING:
    from trackopt.rehearsal.divergence import Divergence
    from trackopt.rehearsal.trace import Step, Trace

_ROUNDING = 1e-6  # kernels that add up in another order differ by less, relative to the value
_SHOWN = 3
_LIBRARIES = {"python": "random", "numpy": "NumPy", "torch": "torch", "cuda": "torch (CUDA)"}
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
    """Why two trainings part.

    Attributes:
        kind: ``data``, ``lr``, ``rng``, ``weights``, ``object``, ``number``, ``length``, ``kernels``, ``state``,
            ``directory`` or ``unknown``.
        observation: What was observed.
        advice: What to do.
    """

    kind: str
    observation: str
    advice: str

    def as_dict(self) -> dict[str, str]:
        """Return the facts under the keys of ``rehearse --json``."""
        return {"kind": self.kind, "seen": self.observation, "advice": self.advice}


@dataclass(frozen=True)
class Diagnosis:
    """Why a rehearsal was not exact.

    Attributes:
        reproducible: Whether two uninterrupted trainings were the same. If not, ``first`` is where those two part.
        first: The first difference; ``None`` where there is nothing to compare.
        cause: The likely one.
    """

    reproducible: bool
    first: Divergence | None
    cause: Cause


def diagnose(a: Trace, b: Trace, control: Trace | None = None) -> Diagnosis | None:
    """What two trainings of one run differ in, and why; ``None`` where every step was the same.

    Args:
        a: An uninterrupted training.
        b: One that was killed and resumed; without ``control`` a second uninterrupted one.
        control: A second uninterrupted one that is the same as ``a``.
    """
    found = divergence.first_divergence(a, b)
    if found is None:
        return None
    return Diagnosis(control is not None, found, _Comparison(a, b, found, control).cause())


class _Comparison:
    """Two trainings and the step at which they part; the questions are asked in the order of cause and effect."""

    def __init__(self, a: Trace, b: Trace, first: Divergence, control: Trace | None) -> None:
        self._traces = (a, b)
        self._first = first
        self._step = first.step or 0
        self._resumed = control is not None
        self._previous = max((step for step in a.steps if step < self._step), default=0)
        self._restored = next((life for life in reversed(b.attempts) if life.step == self._previous), None)
        common = a.steps.keys() & b.steps.keys()
        self._parts = divergence.differing_parts(a, b, self._step) if self._step in common else set()
        at = self._step if self._step in common else max(common, default=0)
        self._steps: tuple[Step, Step] | None = (a.steps[at], b.steps[at]) if at else None
        self._control = control.steps.get(at) if control else None

    def cause(self) -> Cause:
        """The likely one."""
        questions = (self._length, self._weights, self._data, self._learning_rate, self._rng, self._untracked_state)
        return next(filter(None, (ask() for ask in questions)), None) or self._unknown()

    def _length(self) -> Cause | None:
        a, b = (max(trace.steps, default=0) for trace in self._traces)
        if self._parts or a == b or self._step <= min(a, b):
            return None
        seen = f"the one training ended at step {a:,}, the other at step {b:,}"
        if not self._resumed:
            return Cause("length", seen, "let its length depend on steps or epochs, not on the time")
        seen += "".join(f"; {told}" for told in self._numbers())
        return Cause(
            "length",
            seen,
            "take epochs and batches from run.epochs(n) and run.batches(loader), or begin the loop at run.global_step",
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
        models = self._strays("module")
        seen = f"the weights that training went on with were not those of step {self._previous:,}"
        if models:
            return Cause(
                "weights",
                f"{seen}: {_describe_objects(models, self._traces[1])} not handed to wrap()",
                _hand_over(models),
            )
        return Cause("weights", seen, "hand the model to wrap(…, model=model), and leave it alone afterwards")

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
            seen += "".join(f"; {told}" for told in self._numbers())
            return Cause(
                "data",
                f"{seen}, so the loader draws from something that trackopt does not know",
                "let it draw from a generator that is made once, and hand that over: trackopt.wrap(…, rng=rng)",
            )
        if found := self._unseeded():
            return Cause("data", f"{seen}: {found.observation}", found.advice)
        return Cause(
            "data",
            f"{seen}: the order is drawn from something that is different each time, as the time, the system's "
            "entropy or the order of a set",
            "seed what the sampler draws from",
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
        if schedulers := self._strays("scheduler"):
            name = schedulers[0]
            begins = "they begin anew" if len(schedulers) > 1 else "it begins anew"
            return Cause(
                "lr",
                f"{seen}: {_describe_objects(schedulers, self._traces[1])} not handed to wrap(), so {begins} after a resume",
                f"hand it over: trackopt.wrap(optimizer, {name}, …)",
            )
        seen += "".join(f"; {told}" for told in self._numbers())
        return Cause(
            "lr",
            f"{seen}: the script sets it by itself",
            "compute it from run.global_step or run.epoch, or use a scheduler and hand it to wrap()",
        )

    def _rng(self) -> Cause | None:
        if "rng" not in self._parts or self._steps is None:
            return None
        if not self._resumed and (found := self._unseeded()):
            return found
        names = divergence.changed_generators(*self._traces, *(step.before["rng"] for step in self._steps))
        if not names:
            return None  # the step drew more, or less, for a reason that lies elsewhere
        libraries = " and ".join(_LIBRARIES[name] for name in names)
        return Cause(
            "rng",
            f"the global generator of {libraries} did not stand where it stood when step {self._step:,} began",
            "train inside `for epoch in run.epochs(n)`, which puts it back, and neither seed nor draw by the time",
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
            told = [part for part in (found and found.observation, *numbers) if part]
            advice = [part for part in (found and found.advice, numbers and known) if part]
            return Cause("object" if found else "number", f"{seen}; {'; '.join(told)}", "; ".join(advice))
        if self._restored is not None and self._steps is not None and self._steps[0].batch is None:
            return Cause(
                "data",
                "the loop takes its data from elsewhere than run.batches(), so their order is not restored",
                "take the batches from run.batches(loader)",
            )
        if self._restored is not None and (names := self._all("iterator")):
            return Cause(
                "object",
                f"{seen}; {_describe_objects(names, self._traces[1])} in the middle of its data; a resume starts it again",
                "make the iterator anew in each epoch, or take its batches from run.batches(loader)",
            )
        return None

    def _unknown(self) -> Cause:
        a, b = self._first.a, self._first.b
        if self._first.series is None or (
            a is not None and b is not None and abs(a - b) <= _ROUNDING * max(abs(a), abs(b))
        ):
            return Cause(
                "kernels",
                "all that the step came from was identical, and the results differ by no more than rounding: some "
                "kernel adds up in another order each time",
                "torch.use_deterministic_algorithms(True)",
            )
        return Cause(
            "unknown",
            "all that trackopt sees of the step was identical: it depends on something outside, as a file, the time "
            "or an object without a state_dict()",
            "look for what the step reads beside its batch",
        )

    def _unseeded(self) -> Cause | None:
        """Which generator was not seeded, between two uninterrupted trainings."""
        strays = self._traces[1].strays
        if names := self._strays("generator", "loader"):
            own = [name for name in names if strays[name]["kind"] == "generator"]
            advice = f"seed it: {_SEEDED[strays[names[0]]['label']]}" + (f"; and {_hand_over(own)}" if own else "")
            return Cause("object", f"{_describe_objects(names, self._traces[1])} not seeded", advice)
        if self._steps is None:
            return None
        names = divergence.changed_generators(*self._traces, *(step.before["rng"] for step in self._steps))
        if not names:
            return None
        libraries = " and ".join(_LIBRARIES[name] for name in names)
        return Cause(
            "rng", f"the global generator of {libraries} is not seeded", "; ".join(_SEEDS[name] for name in names)
        )

    def _object(self, *kinds: str) -> Cause | None:
        names = self._strays(*kinds)
        if not names:
            return None
        return Cause("object", f"{_describe_objects(names, self._traces[1])} not known to trackopt", _hand_over(names))

    def _strays(self, *kinds: str) -> list[str]:
        """What the script keeps to itself that was in another state when the step began."""
        return [name for name in self._all(*kinds) if name in self._changed_inputs("strays")]

    def _all(self, *kinds: str) -> list[str]:
        return [name for name, about in self._traces[1].strays.items() if about["kind"] in kinds]

    def _numbers(self) -> list[str]:
        """The user's own numbers that were others when the step began, told."""
        found = list(self._changed_inputs("numbers").items())[:_SHOWN]
        return [f"`{name}` was {a} in the one and {b} in the other" for name, (a, b) in found]

    def _changed_inputs(self, what: str) -> dict[str, tuple[Any, Any]]:
        """What differed when the step began, apart from what is different in every training."""
        if self._steps is None:
            return {}
        a, b = (step.before[what] for step in self._steps)
        usual = a if self._control is None else self._control.before[what]
        return {
            name: (a[name], b[name]) for name in a if name in b and a[name] != b[name] and a[name] == usual.get(name)
        }


def _describe_objects(names: list[str], trace: Trace) -> str:
    """``NumPy's Generator `noise` is``, or ``the Adam `a` and the SGD `b` are``."""
    parts = [f"{trace.strays[name]['label']} `{name}`" for name in names[:_SHOWN]]
    return f"{' and '.join(parts)} {'are' if len(names) > 1 else 'is'}"


def _hand_over(names: list[str]) -> str:
    given = [f"{re.findall(r'[A-Za-z_]+[A-Za-z_0-9]*', name)[-1]}={_expression(name)}" for name in names[:_SHOWN]]
    return f"hand {'them' if len(names) > 1 else 'it'} over: trackopt.wrap(…, {', '.join(given)})"


def _expression(name: str) -> str:
    closed = re.search(r"\(…(\w+)…\)$", name)
    return closed.group(1) if closed else name
