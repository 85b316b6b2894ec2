"""What may have caused a difference: the inputs of a step that were not the same, each with an advice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trackopt.rehearsal.trace import Step, Trace

_MAX_NAMES = 3
FINGERPRINT = " #"
#: The keywords that have a meaning in a checkpoint, or in ``wrap`` itself.
TAKEN = frozenset(
    {
        *("model", "optimizer", "scheduler", "gradients", "rng", "trackopt"),
        *("dir", "name", "experiment", "resume", "strict", "change", "sinks", "progress_bar", "stop_signals"),
        *("save_every", "save_overlap", "keep", "keep_best", "keep_every", "upload_checkpoints", "mlflow_run"),
        "mlflow_every",
        *("stats", "stats_every", "histograms_every"),
    }
)


@dataclass(frozen=True)
class Candidate:
    """A possible cause.

    Attributes:
        kind: ``index`` (of an ``enumerate``), ``ahead``, ``value``, or the kind of an untracked object.
        observation: The observed difference.
        advice: How to fix it.
    """

    kind: str
    observation: str
    advice: str


class StepInputs:
    """The inputs of one step in two trainings.

    Args:
        a: The uninterrupted training.
        b: The resumed one.
        control: A second uninterrupted training: what differs there as well is no evidence.
        step: The step, which all of them have.
    """

    def __init__(self, a: Trace, b: Trace, control: Trace | None, step: int) -> None:
        self._step = step
        self._steps: tuple[Step, Step] = (a.steps[step], b.steps[step])
        self._control = control.steps.get(step) if control else None
        self._next = a.steps.get(step + 1)
        self.untracked: Mapping[str, Mapping[str, str]] = b.untracked

    def candidates(self, *kinds: str) -> list[Candidate]:
        """Return the candidates of these kinds, in the order of ``kinds``."""
        found = {
            "index": self._index,
            "ahead": self._ahead,
            "value": self._values,
        }
        return [candidate for kind in kinds for candidate in (found[kind]() if kind in found else self._objects(kind))]

    def changed_objects(self, *kinds: str) -> list[str]:
        """Return the untracked objects of these kinds whose state differed."""
        changed = self._changed("untracked")
        return [name for name, about in self.untracked.items() if about["kind"] in kinds and name in changed]

    def _index(self) -> list[Candidate]:
        """Find the numbers that count the batches of a pass in this process, as ``enumerate(run.batches(…))`` does."""
        (a, b), control = self._steps, self._control
        if a.position is None or b.position is None or a.position == b.position:
            return []
        named = [
            f"`{name}` was {count:,} in the one and {b.counters[name]:,} in the other"
            for name, count in a.counters.items()
            if name in b.counters
            and count - a.position == b.counters[name] - b.position
            and (control is None or control.counters.get(name) == count)
        ]
        reason = "the number of an `enumerate` around run.batches() begins again in a resumed epoch"
        advice = "use run.enumerate(loader), or run.batch"
        return [Candidate("index", f"{_list(named)}: {reason}", advice)] if named else []

    def _ahead(self) -> list[Candidate]:
        """Find the values that were, at the resumed step, what they were a step later in the uninterrupted training."""
        names = [name for name, (_, b) in self._changed("values").items() if self._is_ahead(name, b)]
        if not names:
            return []
        listed, it = _list(f"`{name}`" for name in names), "them" if len(names) > 1 else "it"
        return [
            Candidate(
                "ahead",
                f"{listed} had the value of step {self._step + 1:,} already: it is fetched a step ahead, and the "
                "resumed training fetched one more",
                f"fetch {it} at the beginning of the iteration, or keep {it} in {_state(names)} and continue with that "
                "after a resume",
            )
        ]

    def _is_ahead(self, name: str, text: str) -> bool:
        following = self._next.before.get("values", {}).get(name) if self._next else None
        return FINGERPRINT in text and text == following

    def _values(self) -> list[Candidate]:
        """Describe the script's own values that differed."""
        objects = tuple(f"{name}." for name in self._changed("untracked"))  # which are candidates themselves
        changed = {
            name: pair
            for name, pair in self._changed("values").items()
            if not name.startswith(objects) and not self._is_ahead(name, pair[1])
        }
        return [
            Candidate("value", describe_pair(name, *pair), self._advise(name, pair[0]))
            for name, pair in changed.items()
        ]

    def _advise(self, name: str, text: str) -> str:
        counts = ", or take it from run.global_step if it counts the steps" if text == str(self._step - 1) else ""
        return f"keep `{name}` in {_state([name])}{counts}"

    def _objects(self, kind: str) -> list[Candidate]:
        names = self.changed_objects(kind)
        if not names:
            return []
        described = describe(names, self.untracked)
        if kind != "scheduler":
            return [Candidate(kind, f"{described} not known to trackopt", hand_over(names))]
        it, restart = ("them", "they start again") if len(names) > 1 else ("it", "it starts again")
        return [
            Candidate(
                kind,
                f"{described} not handed to wrap(), so {restart} after a resume",
                f"hand {it} over: trackopt.wrap(optimizer, {_as_argument(names)}, …)",
            )
        ]

    def _changed(self, what: str) -> dict[str, tuple[Any, Any]]:
        """Return the inputs that differed, except those that differ in every training."""
        a, b = (step.before.get(what, {}) for step in self._steps)
        expected = a if self._control is None else self._control.before.get(what, {})
        return {
            name: (a[name], b[name]) for name in a if name in b and a[name] != b[name] and a[name] == expected.get(name)
        }


def join(candidates: list[Candidate]) -> tuple[str, str]:
    """Return the observations and the advices of candidates, each as one text."""
    observations = [candidate.observation for candidate in candidates]
    more = f"; and {len(observations) - _MAX_NAMES} more" if len(observations) > _MAX_NAMES + 1 else ""
    shown = observations[: _MAX_NAMES if more else None]
    text = observations[0] if len(observations) == 1 else f"candidates: {'; '.join(shown)}{more}"
    return text, "; ".join(dict.fromkeys(candidate.advice for candidate in candidates[: len(shown)]))


def describe(names: list[str], untracked: Mapping[str, Mapping[str, str]]) -> str:
    """Join names and verb: ``NumPy's Generator `noise` is``, ``Adam `a` and SGD `b` are``."""
    labelled = _list(f"{untracked[name]['label']} `{name}`" for name in names)
    return f"{labelled} {'are' if len(names) > 1 else 'is'}"


def hand_over(names: list[str]) -> str:
    """Return the advice to pass objects to ``wrap``, under keywords that it accepts."""
    shown = names[:_MAX_NAMES]
    short = [re.findall(r"[A-Za-z_]\w*", name)[-1] for name in shown]
    full = ["_".join(re.findall(r"\w+", name)) for name in shown]
    keywords = short if len(set(short)) == len(short) else full
    arguments = [
        f"{f'own_{keyword}' if keyword in TAKEN else keyword}={_expression(name)}"
        for keyword, name in zip(keywords, shown, strict=True)
    ]
    return f"hand {'them' if len(names) > 1 else 'it'} over: trackopt.wrap(…, {', '.join(arguments)})"


def hand_over_models(names: list[str]) -> str:
    """Return the advice to pass modules to ``wrap`` as its models."""
    return f"hand {'them' if len(names) > 1 else 'it'} over: trackopt.wrap(…, model={_as_argument(names)})"


def _as_argument(names: list[str]) -> str:
    if len(names) == 1:
        return _expression(names[0])
    return "{" + ", ".join(f'"{_key(name)}": {_expression(name)}' for name in names) + "}"


def describe_pair(name: str, a: str, b: str) -> str:
    """Describe a value that differed: ```best` was 0.5 in the one and inf in the other``."""
    kind, is_fingerprint, _ = a.partition(FINGERPRINT)
    other, _, _ = b.partition(FINGERPRINT)
    if not is_fingerprint and FINGERPRINT not in b:
        return f"`{name}` was {a} in the one and {b} in the other"
    same_kind = f"`{name}` ({kind}) was not the same"
    return same_kind if kind == other else f"`{name}` was {kind} in the one and {other} in the other"


def _state(names: list[str]) -> str:
    return _list(f'run.state["{_key(name)}"]' for name in names)


def _key(name: str) -> str:
    return str(re.findall(r"[A-Za-z_]\w*", name)[-1])


def _list(names: Iterable[str]) -> str:
    return " and ".join(list(names)[:_MAX_NAMES])


def _expression(name: str) -> str:
    closure = re.search(r"\(…(\w+)…\)$", name)
    return closure.group(1) if closure else name
