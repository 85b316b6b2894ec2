"""The rehearsal in the training process: record the inputs of each step, and kill the process after the planned one.

``rehearsal.jsonl``, next to the journal, has one JSON line for each event: ``attempt`` when training starts or resumes,
a record of each step, and ``killed`` before the kill. Nothing here draws a random number or changes a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import orjson
import torch

from trackopt.rehearsal.fingerprint import (
    buffer_names,
    fingerprint,
    global_rng,
    learning_rates,
    optimizer_state,
    tracked_objects,
    weights,
)
from trackopt.rehearsal.trace import NAME, join
from trackopt.rehearsal.untracked_state import UntrackedObject, find_untracked
from trackopt.rehearsal.values import carried, loop_counters, root, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from trackopt.rundir.environment import ResumeCheckPlan
    from trackopt.training.objects import Training
    from trackopt.utils.types import StateDict

T = TypeVar("T")


class Probe:
    """Observes one run of a rehearsed training.

    Args:
        plan: The step after which to kill the process.
        training: The live objects, in the state from which training starts or resumes.
        directory: The run's directory.
        step: The step from which it resumes; 0 at the start.
    """

    def __init__(self, plan: ResumeCheckPlan, training: Training, directory: Path, step: int) -> None:
        self._plan = plan
        self._kill_at = plan.kill.get(directory.name)
        self._training = training
        self._file = (directory / NAME).open("ab", buffering=0)
        self._untracked: list[UntrackedObject] = []
        self._names: dict[str, list[str]] = {}
        self._batch: int | None = None  # the fingerprint of the batches since the latest record
        self._position: int | None = None
        self._loader: object = None
        self._rng = global_rng()
        self._before: StateDict | None = None  # the inputs of the current step, once it has begun
        self._start: dict[str, int] | None = weights(training)  # until the first step begins
        self._write(attempt=step, **self._state())
        untraced: Callable[..., Any] = torch.compiler.disable  # Dynamo must not trace the hook of a compiled step
        for optimizer in training.optimizers.values():
            optimizer.register_step_pre_hook(untraced(self._begin_step_without_batch))

    def watch(self, batches: Iterable[T], loader: object) -> Iterator[T]:
        """Yield the batches of ``loader``, and fingerprint each."""
        self._loader = loader
        for number, batch in enumerate(batches):
            if number == 0:
                self._scan_untracked()
            if self._batch is None:
                self._rng = global_rng()
                self._before = self._step_inputs(values())
                self._mark_start(weights(self._training))
            self._batch, self._position = fingerprint(batch, self._batch or 0), number
            yield batch

    def record(self, step: int) -> None:
        """Record the step that is in the journal now, then kill the process if the plan says so."""
        self._write(
            step=step,
            batch=self._batch,
            before=self._pop_inputs(),
            rng=global_rng(),
            position=self._position,
            counters=loop_counters() if self._position is not None else {},
            **self._state(),
        )
        self._batch = self._position = None
        self._rng = global_rng()
        if self._kill_at is not None and step >= self._kill_at:
            self._write(killed=step)
            self._plan.kill_process_group()

    def _begin_step_without_batch(self, *_: object) -> None:
        """Take the inputs of a step whose iteration has no batch of the run, when its optimizer is about to update."""
        if self._before is None:
            self._scan_untracked()
            self._before = self._step_inputs(values(all_names=True))
            at_wrap = self._start or {}  # buffers have been updated by the forward pass
            buffers = {name: at_wrap[name] for name in buffer_names(self._training) if name in at_wrap}
            self._mark_start(weights(self._training) | buffers)

    def _pop_inputs(self) -> StateDict:
        """Return the inputs of the step that has ended; of the variables, those that are carried from step to step."""
        inputs = self._before or self._step_inputs(values())
        self._before = None
        if self._batch is None:
            names = carried()
            inputs["values"] = {path: text for path, text in inputs["values"].items() if root(path) in names}
        return inputs

    def _mark_start(self, fingerprints: dict[str, int]) -> None:
        """Note the weights with which the attempt begins: the script may have changed them after ``wrap``."""
        if self._start is not None:
            self._start = None
            self._write(start=join(fingerprints.values()))

    def _state(self) -> StateDict:
        """Return the state of what the run tracks, eight digits for each tensor; their names are written once."""
        fingerprints = {
            "weights": weights(self._training),
            "optimizer": optimizer_state(self._training),
            "objects": tracked_objects(self._training),
        }
        names = {what: list(parts) for what, parts in fingerprints.items()}
        if names != self._names:
            self._names = names
            self._write(names=names)
        return {
            **{what: join(parts.values()) for what, parts in fingerprints.items()},
            "lr": learning_rates(self._training),
        }

    def _step_inputs(self, found: dict[str, str]) -> StateDict:
        """Return what a step begins with, besides the weights and its batch."""
        states = {untracked.name: untracked.state() for untracked in self._untracked}
        return {"rng": self._rng, "untracked": states, "values": found}

    def _scan_untracked(self) -> None:
        """Look for untracked objects; some of them are made only after ``wrap``, or in each epoch."""
        self._untracked = find_untracked(self._training, self._loader)
        self._write(untracked={each.name: {"kind": each.kind, "label": each.label} for each in self._untracked})

    def _write(self, **line: Any) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
