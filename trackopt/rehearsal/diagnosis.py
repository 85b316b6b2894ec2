"""The likely cause of a difference between two trainings, derived from the inputs of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.rehearsal import divergence
from trackopt.rehearsal.candidates import Candidate, StepInputs, describe, hand_over, hand_over_models, join

if TYPE_CHECKING:
    from trackopt.rehearsal.divergence import Divergence
    from trackopt.rehearsal.trace import Step, Trace

_ROUNDING = 1e-6  # kernels that sum in another order differ by less, relative to the value
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
    """Why two trainings diverge.

    Attributes:
        kind: ``data``, ``lr``, ``rng``, ``weights``, ``optimizer``, ``accumulation``, ``index`` (of an ``enumerate``),
            ``ahead`` (a value fetched a step ahead), ``object``, ``value``, ``length``, ``kernels``, ``state``,
            ``directory`` or ``unknown``.
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


def join_libraries(names: list[str]) -> str:
    """Join the names of global generators: ``NumPy and torch``."""
    return " and ".join(_LIBRARIES.get(name, name) for name in names)


class _Comparison:
    """Two trainings and the step at which they diverge; causes are checked in the order of cause and effect."""

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
        resumed_at = max((start.step for start in b.attempts if start.step < at), default=0)
        after_resume = min((step for step in common if step > resumed_at), default=at)
        # What differed since the resume may show its effect only later.
        self._inputs = [StepInputs(a, b, control, step) for step in dict.fromkeys((at, after_resume)) if step]

    def cause(self) -> Cause:
        """Return the likely cause."""
        checks = (
            *(self._length, self._weights, self._data, self._learning_rate, self._rng),
            *(self._untracked_state, self._own_data, self._restored_object),
        )
        return next(filter(None, (check() for check in checks)), None) or self._unknown()

    def _candidates(self, *kinds: str) -> list[Candidate]:
        return next(filter(None, (inputs.candidates(*kinds) for inputs in self._inputs)), [])

    def _length(self) -> Cause | None:
        a, b = (max(trace.steps, default=0) for trace in self._traces)
        if self._parts or a == b or self._step <= min(a, b):
            return None
        seen = f"one training ended at step {a:,}, the other at step {b:,}"
        if not self._resumed:
            return Cause("length", seen, "make its length depend on steps or epochs, not on time")
        advice = (
            "take epochs and batches from run.epochs(n) and run.batches(loader), or start the loop at run.global_step"
        )
        if found := self._candidates("index", "value"):
            observation, advice = join(found)
            seen += f"; {observation}"
        return Cause("length", seen, advice)

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
            described = describe(models, self._traces[1].untracked)
            return Cause("weights", f"{seen}: {described} not handed to wrap()", hand_over_models(models))
        return Cause("weights", seen, "hand the model to wrap(…, model=model), and do not change it afterwards")

    def _data(self) -> Cause | None:
        if "batch" not in self._parts:
            return None
        seen = "the batch was not the same"
        if self._step > 1 or self._resumed:
            seen = f"the weights at step {self._previous:,} were identical, the batch of step {self._step:,} was not"
        if self._resumed:
            if found := self._candidates("index", "generator", "stateful"):
                observation, advice = join(found)
                if found[0].kind == "index":
                    return Cause("index", f"{seen}; {observation}", advice)
                return Cause("data", f"{seen}: the data are not restored; {observation}", advice)
            loader = Candidate(
                "data",
                "the loader draws from something that trackopt does not know",
                "let it draw from a generator that is created once, and hand that over: trackopt.wrap(…, "
                "generator=generator)",
            )
            observation, advice = join([*self._candidates("value"), loader])
            return Cause("data", f"{seen}: the data are not restored; {observation}", advice)
        if found_unseeded := self._unseeded():
            return Cause("data", f"{seen}: {found_unseeded.observation}", found_unseeded.advice)
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
        if found := self._candidates("index", "scheduler", "value") or self._candidates("stateful"):
            observation, advice = join(found)
            if {each.kind for each in found} == {"value"}:
                advice = f"compute it from run.global_step or run.epoch; or {advice}"
            return Cause("lr", f"{seen}: {observation}", advice)
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
        libraries = join_libraries(names)
        return Cause(
            "rng",
            f"the global generator of {libraries} was in another state when step {self._step:,} began",
            "train inside `for epoch in run.epochs(n)`, which restores it; do not seed or draw by the time",
        )

    def _untracked_state(self) -> Cause | None:
        if not self._resumed:
            return self._unseeded()
        found = self._candidates(
            *("index", "ahead", "generator", "scheduler", "optimizer", "stateful", "module", "value")
        )
        if not found:
            return None
        kind = found[0].kind if found[0].kind in {"index", "ahead", "value"} else "object"
        if kind != "ahead" and self._steps is not None and self._steps[0].batch is None and (data := self._own_data()):
            found.append(Candidate("data", data.observation, data.advice))
        observation, advice = join(found)
        return Cause(kind, f"{self._same_inputs()}; {observation}", advice)

    def _own_data(self) -> Cause | None:
        """Find that the loop takes its data from elsewhere: they begin again after a resume."""
        if not self._resumed or self._restored is None or self._steps is None:
            return None
        if self._steps[0].batch is None:
            return Cause(
                "data",
                "the loop does not take its data from run.batches(), so their order is not restored",
                "take the batches from run.batches(loader)",
            )
        untracked = self._traces[1].untracked
        if names := [name for name, about in untracked.items() if about["kind"] == "iterator"]:
            return Cause(
                "object",
                f"{describe(names, untracked)} in the middle of its data, and starts again after a resume",
                "create the iterator in each epoch, or take its batches from run.batches(loader)",
            )
        return None

    def _restored_object(self) -> Cause | None:
        """Find an object whose own ``load_state_dict`` does not restore all of it."""
        name = self._first.tensor
        if not self._resumed or self._restored is None or self._parts != {"objects"} or name is None:
            return None
        return Cause(
            "state",
            f"{self._same_inputs()}, and {name} differs after it",
            f"check that load_state_dict() of {name.partition('.')[0]} restores all that its state_dict() returns",
        )

    def _same_inputs(self) -> str:
        return f"step {self._step:,} began with the same weights, batch and global generators"

    def _unknown(self) -> Cause:
        same = "all inputs of the step that trackopt sees were identical"
        # If the weights alone differ, the metrics of the next step show by how much.
        size = divergence.relative_difference(*self._traces, self._step + 1)
        if size is not None and size <= _ROUNDING:
            return Cause(
                "kernels",
                f"{same}, and the results differ by no more than rounding ({size:.0e} of the value): some kernel sums "
                "in another order each time",
                "torch.use_deterministic_algorithms(True)",
            )
        unseen = "something else, such as a file, the time or an object without a state_dict()"
        if size is None:
            return Cause(
                "unknown",
                f"{same}; tensors are compared by fingerprints alone, so the size of the difference is not known: it "
                f"depends on {unseen}, or on a kernel that sums in another order each time",
                "look for what the step reads besides its batch; torch.use_deterministic_algorithms(True) excludes the "
                "kernel",
            )
        return Cause("unknown", f"{same}: it depends on {unseen}", "look for what the step reads besides its batch")

    def _unseeded(self) -> Cause | None:
        """Find the generator that was not seeded, between two uninterrupted trainings."""
        untracked = self._traces[1].untracked
        if names := self._changed("generator", "loader"):
            own = [name for name in names if untracked[name]["kind"] == "generator"]
            advice = f"seed it: {_SEEDED[untracked[names[0]]['label']]}" + (f"; and {hand_over(own)}" if own else "")
            return Cause("object", f"{describe(names, untracked)} not seeded", advice)
        if self._steps is None:
            return None
        names = divergence.changed_generators(*self._traces, *(step.before["rng"] for step in self._steps))
        if not names:
            return None
        libraries = join_libraries(names)
        return Cause(
            "rng", f"the global generator of {libraries} is not seeded", "; ".join(_SEEDS[name] for name in names)
        )

    def _changed(self, *kinds: str) -> list[str]:
        """Return the untracked objects of these kinds whose state differed when the step began."""
        return self._inputs[0].changed_objects(*kinds) if self._inputs else []
