"""The training process's end of a rehearsal: what each step came from is written down, and the process is killed.

One JSON line each in ``rehearsal.jsonl``, beside the journal: ``life`` when training starts or resumes, a record for
each step, and ``killed`` before the kill. Nothing here draws a random number or changes a tensor.
"""

from __future__ import annotations

import os
import signal
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

T = TypeVar("T")


class Probe:
    """Watches one run of a rehearsed training.

    Args:
        plan: What the rehearsal wants.
        training: The live objects, in the state that training starts or goes on from.
        directory: The run's.
        step: The step that it goes on from; 0 at the start.
    """

    def __init__(self, plan: ResumeCheckPlan, training: Training, directory: Path, step: int) -> None:
        self._root = plan.root
        self._kill_at = plan.kill.get(directory.name)
        self._training = training
        self._file = (directory / NAME).open("ab", buffering=0)
        self._strays: list[UntrackedObject] = []
        self._names: dict[str, list[str]] = {}
        self._batch: int | None = None  # the fingerprint of the batches since the latest record
        self._loader: object = None
        self._by_batch = False  # whether the loop takes its batches from the run
        self._write(life=step, **self._state())
        self._scan_untracked()
        self._before = self._step_inputs()

    def watch(self, batches: Iterable[T], loader: object) -> Iterator[T]:
        """The same batches, which come from ``loader``, each noted as it goes by."""
        self._by_batch, self._loader = True, loader
        for number, batch in enumerate(batches):
            if number == 0:
                self._scan_untracked()
            if self._batch is None:
                self._before = self._step_inputs()
            self._batch = fingerprint(batch, self._batch or 0)
            yield batch

    def record(self, step: int) -> None:
        """Note the step that is in the journal now, then die if it is the one."""
        self._write(step=step, batch=self._batch, before=self._before, rng=global_rng(), **self._state())
        self._batch = None
        if not self._by_batch:
            self._scan_untracked()
            self._before = self._step_inputs()
        if self._kill_at is not None and step >= self._kill_at:
            self._write(killed=step)
            (self._root / KILLED).touch()
            # As a machine dies: the command that started this process must not go on with its next line.
            os.killpg(0, signal.SIGKILL)

    def _state(self) -> dict[str, Any]:
        """The weights and the optimizers' state, eight digits for each tensor; their names are written once."""
        found = {"weights": weights(self._training), "optimizer": optimizer_state(self._training)}
        names = {what: list(parts) for what, parts in found.items()}
        if names != self._names:
            self._names = names
            self._write(names=names)
        joined = {what: "".join(f"{crc:08x}" for crc in parts.values()) for what, parts in found.items()}
        return {**joined, "lr": learning_rates(self._training)}

    def _step_inputs(self) -> dict[str, Any]:
        """What a step begins with, beside the weights and its batch."""
        return {
            "rng": global_rng(),
            "strays": {stray.name: stray.state() for stray in self._strays},
            "numbers": numbers(),
        }

    def _scan_untracked(self) -> None:
        """Look for what the script keeps to itself; some of it is made only after ``wrap``, or epoch by epoch."""
        self._strays = find_untracked(self._training, self._loader)
        self._write(strays={stray.name: {"kind": stray.kind, "label": stray.label} for stray in self._strays})

    def _write(self, **line: Any) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
