"""The rehearsal in the training process: record the inputs of each step, and kill the process after the planned one.

``rehearsal.jsonl``, next to the journal, has one JSON line for each event: ``attempt`` when training starts or resumes,
a record of each step, and ``killed`` before the kill. Nothing here draws a random number or changes a tensor.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from trackopt.rehearsal.fingerprint import fingerprint, global_rng, learning_rates, optimizer_state, weights
from trackopt.rehearsal.trace import NAME
from trackopt.rehearsal.untracked_state import UntrackedObject, find_untracked, numbers
from trackopt.rundir.environment import KILLED, ResumeCheckPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

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
        self._root = plan.root
        self._kill_at = plan.kill.get(directory.name)
        self._training = training
        self._file = (directory / NAME).open("ab", buffering=0)
        self._untracked: list[UntrackedObject] = []
        self._names: dict[str, list[str]] = {}
        self._batch: int | None = None  # the fingerprint of the batches since the latest record
        self._loader: object = None
        self._uses_batches = False  # the loop takes its batches from the run
        self._write(attempt=step, **self._state())
        self._scan_untracked()
        self._before = self._step_inputs()

    def watch(self, batches: Iterable[T], loader: object) -> Iterator[T]:
        """Yield the batches of ``loader``, and fingerprint each."""
        self._uses_batches, self._loader = True, loader
        for number, batch in enumerate(batches):
            if number == 0:
                self._scan_untracked()
            if self._batch is None:
                self._before = self._step_inputs()
            self._batch = fingerprint(batch, self._batch or 0)
            yield batch

    def record(self, step: int) -> None:
        """Record the step that is in the journal now, then kill the process if the plan says so."""
        self._write(step=step, batch=self._batch, before=self._before, rng=global_rng(), **self._state())
        self._batch = None
        if not self._uses_batches:
            self._scan_untracked()
            self._before = self._step_inputs()
        if self._kill_at is not None and step >= self._kill_at:
            self._write(killed=step)
            (self._root / KILLED).touch()
            if sys.platform != "win32":  # which has no rehearsals
                # Like a crash of the machine: the command that started this process must not run its next line.
                os.killpg(0, signal.SIGKILL)

    def _state(self) -> StateDict:
        """Return the weights and the optimizers' state, eight digits for each tensor; their names are written once."""
        fingerprints = {"weights": weights(self._training), "optimizer": optimizer_state(self._training)}
        names = {what: list(parts) for what, parts in fingerprints.items()}
        if names != self._names:
            self._names = names
            self._write(names=names)
        joined = {what: "".join(f"{crc:08x}" for crc in parts.values()) for what, parts in fingerprints.items()}
        return {**joined, "lr": learning_rates(self._training)}

    def _step_inputs(self) -> StateDict:
        """Return what a step begins with, besides the weights and its batch."""
        return {
            "rng": global_rng(),
            "untracked": {untracked.name: untracked.state() for untracked in self._untracked},
            "numbers": numbers(),
        }

    def _scan_untracked(self) -> None:
        """Look for untracked objects; some of them are made only after ``wrap``, or in each epoch."""
        self._untracked = find_untracked(self._training, self._loader)
        self._write(untracked={each.name: {"kind": each.kind, "label": each.label} for each in self._untracked})

    def _write(self, **line: Any) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
