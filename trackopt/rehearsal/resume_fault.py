"""The likely fault of a resume by the script's or a framework's own means, derived from the inputs of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trackopt.rehearsal.candidates import FINGERPRINT, describe_pair
from trackopt.rehearsal.diagnosis import LIBRARIES, Cause, Diagnosis
from trackopt.rehearsal.divergence import Divergence, changed_generators, differing_names, differing_points

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.rehearsal.trace import AttemptStart, Step, Trace

_MAX_NAMES = 3
_MAX_AHEAD = 8  # batches that a loader may have fetched and that a resume then skips
_STATEFUL = ("scheduler", "optimizer", "stateful", "module", "generator")


def first_difference(a: Trace, b: Trace) -> Divergence | None:
    """Find the first step whose batch, weights, optimizer state, learning rates or loss differ.

    Other models, such as averaged ones, come next, then the number of steps. Generators alone are no difference:
    many trainings draw from them only before the first step.
    """
    common = sorted(a.steps.keys() & b.steps.keys())
    losses = {step: (x, y) for step, _, x, y in differing_points(a, b)}
    for step in common:
        x, y = a.steps[step], b.steps[step]
        if step in losses or any(
            getattr(x, part) != getattr(y, part) for part in ("batch", "weights", "optimizer", "lr")
        ):
            tensor = next(iter(differing_names(a, x, y)), None)
            return Divergence(a.name, step, "loss" if step in losses else None, *losses.get(step, (None, None)), tensor)
    for step in common:
        if names := _changed_models(a, b, step):
            return Divergence(a.name, step, tensor=names[0])
    missing = a.steps.keys() ^ b.steps.keys()
    return Divergence(a.name, min(missing)) if missing else None


def diagnose_resume(a: Trace, b: Trace, control: Trace | None) -> Diagnosis | None:
    """Find the first difference that a kill and a resume made, and its likely cause; ``None`` if there is none.

    Args:
        a: An uninterrupted training.
        b: A training that was killed, and resumed by its own means.
        control: A second uninterrupted training, identical to ``a`` as far as it goes.
    """
    first = first_difference(a, b)
    return None if first is None else Diagnosis(True, first, _Resume(a, b, first, control).cause())


class _Resume:
    """Two trainings, the step at which they diverge, and the attempt that made this step."""

    def __init__(self, a: Trace, b: Trace, first: Divergence, control: Trace | None) -> None:
        self._a, self._b, self._t = a, b, first.step or 0
        self._start: AttemptStart = next((each for each in reversed(b.attempts) if each.step < self._t), b.attempts[0])
        self._s = self._start.step
        self._steps = (a.steps[self._t], b.steps[self._t]) if self._t in a.steps and self._t in b.steps else None
        self._control = control.steps.get(self._t) if control else None

    def cause(self) -> Cause:
        checks = [self._weights, self._optimizer, self._length]
        if self._steps is not None:
            parts = [self._learning_rate, self._passes, self._data, self._generators, self._objects]
            checks += [lambda check=check: check(*self._steps) for check in parts]  # type: ignore[misc]
        return next(filter(None, (check() for check in checks)), None) or Cause(
            "unknown",
            f"step {self._t:,} began with the same weights, optimizer state, learning rates, batch and generators",
            "look for what the step reads besides: a file, the time, tensors in an object without state_dict()",
        )

    @property
    def _where(self) -> str:
        return f"the training that resumed after step {self._s:,}"

    def _saved_state(self) -> Step | None:
        return self._a.steps.get(self._s)

    def _weights(self) -> Cause | None:
        before = self._saved_state() or self._a.attempts[0]
        names = _differing(self._a.names["weights"], before.weights, self._start.weights)
        if not names:
            return None
        count = len(self._a.names["weights"])
        return Cause(
            "weights",
            f"{self._where} began with other weights: {len(names):,} of {count:,} tensors differ, {_list(names)}",
            "save model.state_dict(), with its buffers and in its own dtype, and load it before the first step",
        )

    def _optimizer(self) -> Cause | None:
        saved = self._saved_state()
        if saved is None or saved.optimizer == self._start.optimizer:
            return None
        dtypes, now = self._a.dtypes, self._start.dtypes
        if dtypes and not now:
            return Cause(
                "optimizer",
                f"{self._where} began with an empty optimizer: its state was dropped",
                "save optimizer.state_dict() and load it after the optimizer is made",
            )
        changed = [
            f"{name} is {now[name]} instead of {dtype}"
            for name, dtype in dtypes.items()
            if now.get(name, dtype) != dtype
        ]
        if changed:
            return Cause(
                "optimizer",
                f"{self._where} has its optimizer state in another dtype: {', '.join(changed)}",
                "save and load the state in its own dtype: load_state_dict() casts floating state to the parameter's",
            )
        names = _differing(self._a.names["optimizer"], saved.optimizer, self._start.optimizer)
        return Cause(
            "optimizer",
            f"{self._where} began with another optimizer state, of {_list(names)}",
            "save optimizer.state_dict() at the same step as the model, and load it after the optimizer is made",
        )

    def _length(self) -> Cause | None:
        if self._steps is not None:
            return None
        a, b = max(self._a.steps), max(self._b.steps)
        kind = "an epoch is counted twice" if b > a else "part of an epoch is skipped"
        return Cause(
            "length",
            f"the resumed training ended at step {b:,} instead of {a:,}: {kind}",
            "save the number of the next epoch and of the next batch, and begin the loop there",
        )

    def _learning_rate(self, x: Step, y: Step) -> Cause | None:
        used = [(x.before["lr"][group], y.before["lr"].get(group)) for group in x.before["lr"]]
        pairs = [pair for pair in used if pair[0] != pair[1]] or [
            pair for pair in zip(x.lr, y.lr, strict=False) if pair[0] != pair[1] and x.weights == y.weights
        ]
        if not pairs:
            return None
        positions = [
            f"{name} was at {y.before['schedulers'][name]} instead of {position}"
            for name, position in x.before["schedulers"].items()
            if y.before["schedulers"].get(name, position) != position
        ]
        seen = f"step {self._t:,} used the learning rate {pairs[0][1]} instead of {pairs[0][0]}"
        return Cause(
            "lr",
            "; ".join([seen, *positions, *([] if positions else self._values())]),
            "save scheduler.state_dict() and load it after the optimizer's; step it once for each step or epoch",
        )

    def _passes(self, x: Step, y: Step) -> Cause | None:
        a, b = x.before["forward"]["passes"], y.before["forward"]["passes"]
        if a == b and not _is_shifted(x.before["forward"]["inputs"], y.before["forward"]["inputs"]):
            return None
        passes = f"was made of {b} forward passes instead of {a}" if a != b else "took part of the batches of another"
        seen = f"step {self._t:,} {passes}: accumulation resumed in another phase"
        return Cause(
            "accumulation",
            "; ".join([seen, *self._values()]),
            "save only after optimizer.step(), or count the batches of the epoch from the position that was restored",
        )

    def _data(self, x: Step, y: Step) -> Cause | None:
        if x.batch == y.batch:
            return None
        fetched = x.before["forward"]["fetched"], y.before["forward"]["fetched"]
        if len({a == b for a, b in zip(*fetched, strict=False)}) > 1:  # of samples and labels, one is the same
            return self._augmentation()
        places = [step for step, each in self._a.steps.items() if each.batch == y.batch]
        seen = f"the batch of step {self._t:,} was not the same"
        advice = "save the position in the epoch, and skip the batches before it when the epoch resumes"
        if place := self._nearest(places):
            if reseeded := self._reseeded(place, x, y):
                names = " and ".join(LIBRARIES.get(name, name) for name in reseeded)
                seen = f"the global generator of {names} starts again from its seed when the training resumes, so "
                seen += f"step {self._t:,} had the batch of step {place:,}"
                return Cause("rng", seen, "save the states of the random generators, and restore them last")
            if place > self._t:
                seen = f"the batch of step {self._t:,} was that of step {place:,}: {place - self._t} of them "
                seen += "had been fetched ahead when the checkpoint was written, and were skipped"
                advice = "save the position of the last batch that was used, not of the last one that was fetched"
            else:
                seen = f"the batch of step {self._t:,} was that of step {place:,}: "
                seen += self._repeated()
            return Cause("data", seen, advice)
        generators = self._changed_generators(x, y)
        own = self._changed("generator", "loader")
        found = [f"the global generator of {LIBRARIES.get(name, name)}" for name in generators]
        found += [f"{self._b.untracked[name]['label']} `{name}`" for name in own]
        if found:
            seen += f": the order is drawn anew; candidates: {', '.join(found)}"
            advice = (
                "save the state of this generator at the start of the epoch and restore it before the loader is used"
            )
        else:
            seen += f": {self._repeated()}" if self._more_steps() else "; the order of the data is not restored"
        return Cause("data", "; ".join([seen, *self._values(tensors=False)]), advice)

    def _augmentation(self) -> Cause:
        seen = f"step {self._t:,} had the same samples, changed by other random transformations"
        if any(self._start.loaders):
            return Cause(
                "data",
                f"{seen}: the generators of the loader's workers are not restored",
                "derive the transformation's seed from epoch and index, or keep the worker states in the checkpoint",
            )
        names = [LIBRARIES.get(name, name) for name in self._changed_generators(*self._steps)] if self._steps else []
        of = f": the generator of {' or '.join(names)} was in another state" if names else ""
        return Cause("rng", seen + of, "save and restore the states of the random generators")

    def _reseeded(self, place: int, x: Step, y: Step) -> list[str]:
        """Return the generators that were in the state that an earlier step began with."""
        earlier = self._a.steps[place].before["rng"]
        return [name for name in self._changed_generators(x, y) if y.before["rng"][name] == earlier[name]]

    def _nearest(self, places: list[int]) -> int | None:
        ahead = [place for place in places if 0 < place - self._t <= _MAX_AHEAD]
        behind = [place for place in places if place < self._t]
        return min(ahead, default=None) or max(behind, default=None)

    def _more_steps(self) -> int:
        return max(self._b.steps) - max(self._a.steps)

    def _repeated(self) -> str:
        more = self._more_steps()
        if more > 0:
            return f"data are repeated, {more:,} steps more than without the kill, so an epoch is counted twice"
        return "the data start again from there"

    def _generators(self, x: Step, y: Step) -> Cause | None:
        names = [LIBRARIES.get(name, name) for name in self._changed_generators(x, y)]
        if not names:
            return None
        return Cause(
            "rng",
            f"the global generator of {' and '.join(names)} was in another state when step {self._t:,} began",
            "save the states of the random generators with the model, and restore them last",
        )

    def _changed_generators(self, x: Step, y: Step) -> list[str]:
        return changed_generators(self._a, self._b, x.before["rng"], y.before["rng"])

    def _objects(self, x: Step, y: Step) -> Cause | None:
        if (x.weights, x.optimizer) == (y.weights, y.optimizer):  # another model alone
            names, found = self._changed("module"), []
        else:
            names, found = self._changed(*_STATEFUL), self._values()
        if not names and not found:
            return None
        seen = f"step {self._t:,} began with the same weights, batch and generators"
        found = [self._describe(names)] * bool(names) + found
        label = "candidates: " if len(found) > 1 else ""
        return Cause(
            "object" if names else "value",
            f"{seen}; {label}{'; '.join(found)}",
            "save and restore " + ("its state" if len(found) == 1 else "what the step depends on"),
        )

    def _changed(self, *kinds: str) -> list[str]:
        """Return the untracked objects of these kinds whose state differed; of several names for one, the first."""
        about = self._b.untracked
        pairs = {(a, b): name for name, a, b in self._changed_inputs("untracked") if about[name]["kind"] in kinds}
        return list(pairs.values())

    def _values(self, *, tensors: bool = True) -> list[str]:
        """Describe the variables that differed, without tensors where the batch is one of them."""
        changed = [pair for pair in self._changed_inputs("values") if tensors or FINGERPRINT not in pair[1]]
        return [describe_pair(*pair) for pair in changed][:_MAX_NAMES]

    def _changed_inputs(self, what: str) -> Iterator[tuple[str, Any, Any]]:
        """Yield what differed when the step began, except what differs in every training."""
        if self._steps is None:
            return
        a, b = (step.before[what] for step in self._steps)
        expected = a if self._control is None else self._control.before[what]
        for name in a:
            if name in b and a[name] != b[name] and a[name] == expected.get(name) and self._varies(what, name):
                yield name, a[name], b[name]

    def _varies(self, what: str, name: str) -> bool:
        """Return whether it changes in an uninterrupted training; if not, it is a setting, such as the first epoch."""
        return len({step.before[what].get(name) for step in self._a.steps.values()}) > 1

    def _describe(self, names: list[str]) -> str:
        parts = [f"{self._b.untracked[name]['label']} `{name}`" for name in names[:_MAX_NAMES]]
        return f"{' and '.join(parts)} {'are' if len(names) > 1 else 'is'} not restored"


def _changed_models(a: Trace, b: Trace, step: int) -> list[str]:
    x, y = (trace.steps[step].before["untracked"] for trace in (a, b))
    return [name for name in x if name in y and x[name] != y[name] and a.untracked[name]["kind"] == "module"]


def _is_shifted(x: list[int], y: list[int]) -> bool:
    """Return whether some, not all, inputs of a step are those of the other at another place."""
    return any(x[shift:] == y[:-shift] or y[shift:] == x[:-shift] for shift in range(1, min(len(x), len(y))))


def _differing(names: list[str], x: str, y: str) -> list[str]:
    return [name for index, name in enumerate(names) if x[index * 8 : index * 8 + 8] != y[index * 8 : index * 8 + 8]]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
