"""The likely fault of a resume by the script's or a framework's own means, derived from the inputs of each step."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trackopt.rehearsal.data_fault import find_data_fault
from trackopt.rehearsal.diagnosis import Cause, Diagnosis, join_libraries
from trackopt.rehearsal.divergence import Divergence, differing_entries, differing_names, differing_points
from trackopt.rehearsal.resumed_step import ResumedStep, attempt_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.rehearsal.trace import Trace

_MAX_NAMES = 3
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
    return None if first is None else Diagnosis(True, first, _find_cause(a, b, first.step or 0, control))


def _find_cause(a: Trace, b: Trace, step: int, control: Trace | None) -> Cause:
    checks: list[Callable[[], Cause | None]] = [lambda: _find_state_fault(a, b, step)]
    if step in a.steps and step in b.steps:
        resumed = ResumedStep(a, b, step, control)
        faults = (_find_lr_fault, _find_accumulation_fault, find_data_fault, _find_rng_fault, _find_object_fault)
        checks += [functools.partial(fault, resumed) for fault in faults]
    else:
        checks.append(lambda: _length_fault(a, b))
    return next(filter(None, (check() for check in checks)), None) or Cause(
        "unknown",
        f"step {step:,} began with the same weights, optimizer state, learning rates, batch and generators",
        "look for what the step reads besides: a file, the time, tensors in an object without state_dict()",
    )


def _find_state_fault(a: Trace, b: Trace, step: int) -> Cause | None:
    """Compare the weights and the optimizer's state with which the attempt began."""
    start = attempt_of(b, step)
    saved = a.steps.get(start.step)
    before = saved or a.attempts[0]
    where = f"the training that resumed after step {start.step:,}"
    if names := list(differing_entries(a.names["weights"], before.weights, start.weights)):
        count = len(a.names["weights"])
        return Cause(
            "weights",
            f"{where} began with other weights: {len(names):,} of {count:,} tensors differ, {_list(names)}",
            "save model.state_dict(), with its buffers and in its own dtype, and load it before the first step",
        )
    if saved is None or saved.optimizer == start.optimizer:
        return None
    if a.dtypes and not start.dtypes:
        return Cause(
            "optimizer",
            f"{where} began with an empty optimizer: its state was dropped",
            "save optimizer.state_dict() and load it after the optimizer is made",
        )
    if changed := [
        f"{name} is {start.dtypes[name]} instead of {dtype}"
        for name, dtype in a.dtypes.items()
        if start.dtypes.get(name, dtype) != dtype
    ]:
        return Cause(
            "optimizer",
            f"{where} has its optimizer state in another dtype: {', '.join(changed)}",
            "save and load the state in its own dtype: load_state_dict() casts floating state to the parameter's",
        )
    names = list(differing_entries(a.names["optimizer"], saved.optimizer, start.optimizer))
    return Cause(
        "optimizer",
        f"{where} began with another optimizer state, of {_list(names)}",
        "save optimizer.state_dict() at the same step as the model, and load it after the optimizer is made",
    )


def _length_fault(a: Trace, b: Trace) -> Cause:
    ends = max(a.steps), max(b.steps)
    kind = "an epoch is counted twice" if ends[1] > ends[0] else "part of an epoch is skipped"
    return Cause(
        "length",
        f"the resumed training ended at step {ends[1]:,} instead of {ends[0]:,}: {kind}",
        "save the number of the next epoch and of the next batch, and begin the loop there",
    )


def _find_lr_fault(resumed: ResumedStep) -> Cause | None:
    x, y = resumed.steps
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
    seen = f"step {resumed.number:,} used the learning rate {pairs[0][1]} instead of {pairs[0][0]}"
    return Cause(
        "lr",
        "; ".join([seen, *(positions or resumed.values())]),
        "save scheduler.state_dict() and load it after the optimizer's; step it once for each step or epoch",
    )


def _find_accumulation_fault(resumed: ResumedStep) -> Cause | None:
    x, y = (step.before["forward"] for step in resumed.steps)
    if x["passes"] != y["passes"]:
        seen = f"was made of {y['passes']} forward passes instead of {x['passes']}"
    elif _is_shifted(x["inputs"], y["inputs"]):
        seen = "took part of the batches of another"
    else:
        return None
    return Cause(
        "accumulation",
        "; ".join([f"step {resumed.number:,} {seen}: accumulation resumed in another phase", *resumed.values()]),
        "save only after optimizer.step(), or count the batches of the epoch from the position that was restored",
    )


def _find_rng_fault(resumed: ResumedStep) -> Cause | None:
    names = resumed.generators()
    if not names:
        return None
    return Cause(
        "rng",
        f"the global generator of {join_libraries(names)} was in another state when step {resumed.number:,} began",
        "save the states of the random generators with the model, and restore them last",
    )


def _find_object_fault(resumed: ResumedStep) -> Cause | None:
    x, y = resumed.steps
    if (x.weights, x.optimizer) == (y.weights, y.optimizer):  # another model alone
        names, values = resumed.objects("module"), []
    else:
        names, values = resumed.objects(*_STATEFUL), resumed.values()
    found = [f"{resumed.label(name)} is not restored" for name in names[:_MAX_NAMES]] + values
    if not found:
        return None
    label = "candidates: " if len(found) > 1 else ""
    return Cause(
        "object" if names else "value",
        f"step {resumed.number:,} began with the same weights, batch and generators; {label}{'; '.join(found)}",
        "save and restore " + ("its state" if len(found) == 1 else "what the step depends on"),
    )


def _changed_models(a: Trace, b: Trace, step: int) -> list[str]:
    x, y = (trace.steps[step].before["untracked"] for trace in (a, b))
    return [name for name in x if name in y and x[name] != y[name] and a.untracked[name]["kind"] == "module"]


def _is_shifted(x: list[int], y: list[int]) -> bool:
    """Return whether some, not all, inputs of a step are those of the other at another place."""
    return any(x[shift:] == y[:-shift] or y[shift:] == x[:-shift] for shift in range(1, min(len(x), len(y))))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
