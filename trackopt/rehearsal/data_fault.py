"""The likely reason why a resumed training had other data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.rehearsal.diagnosis import Cause, join_libraries

if TYPE_CHECKING:
    from trackopt.rehearsal.resumed_step import ResumedStep

_MAX_AHEAD = 8  # batches that a loader may have fetched and that a resume then skips
_RESTORE_RNG = "save the states of the random generators, and restore them last"


def find_data_fault(resumed: ResumedStep) -> Cause | None:
    """Return why the batch of the step was another; ``None`` if it was the same."""
    x, y = resumed.steps
    fetched = x.before["forward"]["fetched"], y.before["forward"]["fetched"]
    if x.batch == y.batch or (fetched[0] and fetched[0] == fetched[1]):  # or something was mixed into it
        return None
    if len({a == b for a, b in zip(*fetched, strict=False)}) > 1:  # of samples and labels, one is the same
        return _other_transformation(resumed)
    place = _find_batch(resumed)
    return _other_order(resumed) if place is None else _other_position(resumed, place)


def _other_transformation(resumed: ResumedStep) -> Cause:
    seen = f"step {resumed.number:,} had the same samples, changed by other random transformations"
    if any(resumed.start.loaders):
        return Cause(
            "data",
            f"{seen}: the generators of the loader's workers are not restored",
            "derive the transformation's seed from epoch and index, or keep the worker states in the checkpoint",
        )
    names = resumed.generators()
    of = f": the generator of {join_libraries(names)} was in another state" if names else ""
    return Cause("rng", seen + of, _RESTORE_RNG)


def _find_batch(resumed: ResumedStep) -> int | None:
    """Return the step of the uninterrupted training that had the batch: the next one, or the latest one before."""
    places = [step for step, each in resumed.a.steps.items() if each.batch == resumed.steps[1].batch]
    ahead = [place for place in places if 0 < place - resumed.number <= _MAX_AHEAD]
    behind = [place for place in places if place < resumed.number]
    return min(ahead, default=None) or max(behind, default=None)


def _other_position(resumed: ResumedStep, place: int) -> Cause:
    number = resumed.number
    earlier, now = resumed.a.steps[place].before["rng"], resumed.steps[1].before["rng"]
    if reseeded := [name for name in resumed.generators() if now[name] == earlier[name]]:
        seen = f"the global generator of {join_libraries(reseeded)} starts again from its seed when the training "
        return Cause("rng", f"{seen}resumes, so step {number:,} had the batch of step {place:,}", _RESTORE_RNG)
    seen = f"the batch of step {number:,} was that of step {place:,}"
    if place > number:
        return Cause(
            "data",
            f"{seen}: {place - number} of them had been fetched ahead when the checkpoint was written, and were "
            "skipped",
            "save the position of the last batch that was used, not of the last one that was fetched",
        )
    return Cause(
        "data",
        f"{seen}: {_describe_repetition(resumed)}",
        "save the position in the epoch, and skip the batches before it when the epoch resumes",
    )


def _other_order(resumed: ResumedStep) -> Cause:
    seen = f"the batch of step {resumed.number:,} was not the same"
    candidates = [f"the global generator of {join_libraries([name])}" for name in resumed.generators()]
    candidates += [resumed.label(name) for name in resumed.objects("generator", "loader")]
    values = resumed.values(tensors=False)
    if candidates:
        return Cause(
            "data",
            "; ".join([f"{seen}: the order is drawn anew; candidates: {', '.join(candidates)}", *values]),
            "save the state of this generator at the start of the epoch and restore it before the loader is used",
        )
    more = f": {_describe_repetition(resumed)}" if resumed.more_steps else "; the order of the data is not restored"
    return Cause(
        "data",
        "; ".join([seen + more, *values]),
        "save the position in the epoch, and skip the batches before it when the epoch resumes",
    )


def _describe_repetition(resumed: ResumedStep) -> str:
    if resumed.more_steps > 0:
        return (
            f"data are repeated, {resumed.more_steps:,} steps more than without the kill, so an epoch is counted twice"
        )
    return "the data start again from there"
