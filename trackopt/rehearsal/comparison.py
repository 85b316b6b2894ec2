"""The comparison of a killed training with an uninterrupted one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trackopt.analysis.diff import diff
from trackopt.rehearsal import trace
from trackopt.rehearsal.diagnosis import Cause, Diagnosis, diagnose
from trackopt.rehearsal.divergence import Divergence, same_series, unused_generators
from trackopt.rehearsal.resume_fault import diagnose_resume, first_difference
from trackopt.rundir.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trackopt.rehearsal.trace import Trace
    from trackopt.rehearsal.training_command import TrainingCommand

_NOT_REPEATABLE = Cause(
    "unknown", "the trainings depend on something that is different each time", "seed every generator before the model"
)
_RANDOM = re.compile(r"(?:^|\.)rng\.(\w+)")


def find_fault(
    reference: TrainingCommand, killed: TrainingCommand, run_control: Callable[[Mapping[str, int]], TrainingCommand]
) -> Diagnosis | None:
    """Find out why the killed training differs from the uninterrupted one; ``None`` if it does not.

    Args:
        reference: The uninterrupted training.
        killed: The killed and resumed training.
        run_control: Runs the training once more, uninterrupted, to the given step of each run or to its end.
    """
    if trace.OBSERVED in reference.traces:
        return _find_observed_fault(reference.traces[trace.OBSERVED], killed.traces[trace.OBSERVED], run_control)
    if reference.traces.keys() != killed.traces.keys():
        names = ", ".join(sorted(reference.traces.keys() ^ killed.traces.keys())[:3])
        seen = f"each start of the command chose another directory ({names}), so there was nothing to resume"
        return Diagnosis(True, None, Cause("directory", seen, "give wrap() the same dir at every start"))
    if all(_same(reference, killed, run) for run in reference.traces):
        return None
    control = run_control({})
    for run in reference.traces:
        if run in control.traces and not _same(reference, control, run):
            return _compare(reference, control, run, None)
    run = next(run for run in reference.traces if not _same(reference, killed, run))
    return _compare(reference, killed, run, control.traces.get(run))


def differs_already(reference: TrainingCommand, killed: TrainingCommand) -> bool:
    """Return whether a training that is not over differs so far; runs of ``wrap`` are compared at their end."""
    if trace.OBSERVED not in reference.traces:
        return False
    killed.read()
    so_far = killed.traces[trace.OBSERVED]
    return first_difference(reference.traces[trace.OBSERVED].until(max(so_far.steps, default=0)), so_far) is not None


def _find_observed_fault(
    a: Trace, b: Trace, run_control: Callable[[Mapping[str, int]], TrainingCommand]
) -> Diagnosis | None:
    first = first_difference(a, b)
    if first is None or first.step is None:
        return None
    control = run_control({trace.OBSERVED: first.step}).traces[trace.OBSERVED]
    limit = max(control.steps)
    if (repeated := first_difference(a.until(limit), control)) is not None:
        found = diagnose(a.until(limit), control)
        return Diagnosis(False, repeated, found.cause if found is not None else _NOT_REPEATABLE)
    return diagnose_resume(a, b, control)


def _compare(a: TrainingCommand, b: TrainingCommand, run: str, control: Trace | None) -> Diagnosis:
    diagnosis = diagnose(a.traces[run], b.traces[run], control)
    if diagnosis is not None:
        return diagnosis
    path = _changed_paths(a, b, run)[0]
    cause = Cause(
        "state",
        f"every step was the same, but {path} in the final checkpoint is not",
        f"check that load_state_dict() of {path.partition('.')[0]} restores everything that its state_dict() returns",
    )
    return Diagnosis(control is not None, Divergence(run, None, tensor=path), cause)


def _same(a: TrainingCommand, b: TrainingCommand, run: str) -> bool:
    return same_series(a.traces[run], b.traces[run]) and not _changed_paths(a, b, run)


def _changed_paths(a: TrainingCommand, b: TrainingCommand, run: str) -> list[str]:
    """List what differs in the final checkpoints, without generators that nothing drew from: they have no effect."""
    directories = [training.root / run for training in (a, b)]
    saved = [bool(list_checkpoints(directory)) for directory in directories]
    if not all(saved):
        return ["the final checkpoint"] if any(saved) else []
    unused = unused_generators(a.traces[run]) & unused_generators(b.traces[run])
    paths = [change.path for change in diff(*directories).changes]
    return [path for path in paths if not ((match := _RANDOM.search(path)) and match.group(1) in unused)]
