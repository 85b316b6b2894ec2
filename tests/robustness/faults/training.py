"""The training that is put to the test, and what it told to be done before it ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from typing import TYPE_CHECKING, Any

import torch

import trackopt
from tests.helpers.training import make_training, train_step

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt import Run

_RECORDS, _CHECKPOINT, _RESUMED, _THROUGH = range(4)
_FIRST = 8
_HALF = 1 << 16


class Told:
    """What a training told, in memory that it shares with its parent: telling makes no system call.

    Attributes:
        aloud: Whether it is also said in a system call that does nothing, for a log of system calls.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * _HALF)
        self._numbers = memoryview(self._memory)[:_HALF].cast("d")
        self.aloud = False
        self.clear()

    def clear(self) -> None:
        """Nothing was told."""
        self._memory[:] = bytes(2 * _HALF)
        self._words: dict[str, Any] = {}
        self._numbers[_RESUMED] = -1

    def begun(self, run: Run) -> None:
        """``wrap`` returned."""
        self._numbers[_RESUMED] = run.resumed_from or 0
        self._numbers[_CHECKPOINT] = run._loop.checkpoints.saver.latest.step

    def done(self, run: Run, losses: dict[int, float]) -> None:
        """These steps are in the journal, unless it keeps lines back, and this checkpoint is on the disk."""
        if not run._loop.attempt.journal._unwritten:
            for step in [step for step in losses if step <= run._loop.attempt.telemetry.recorded]:
                count = int(self._numbers[_RECORDS])
                self._numbers[_FIRST + 2 * count] = step
                self._numbers[_FIRST + 2 * count + 1] = losses.pop(step)
                self._numbers[_RECORDS] = count + 1
        self._numbers[_CHECKPOINT] = run._loop.checkpoints.saver.latest.step
        if self.aloud:
            with contextlib.suppress(OSError):
                os.write(-1, json.dumps(self.facts()).encode())

    def through(self, digest: str) -> None:
        """The training came to its end."""
        self.note({"digest": digest})
        self._numbers[_THROUGH] = 1

    def note(self, facts: dict[str, Any]) -> None:
        """Facts in words, beside those that were noted before."""
        self._words |= facts
        text = json.dumps(self._words).encode()
        self._memory[_HALF + 8 : _HALF + 8 + len(text)] = text
        self._memory[_HALF : _HALF + 8] = len(text).to_bytes(8, "little")

    def facts(self) -> dict[str, Any]:
        """All that was told."""
        count = int(self._numbers[_RECORDS])
        pairs = self._numbers[_FIRST : _FIRST + 2 * count].tolist()
        size = int.from_bytes(self._memory[_HALF : _HALF + 8], "little")
        return {
            "records": [[int(step), loss] for step, loss in zip(pairs[::2], pairs[1::2], strict=True)],
            "checkpoint": int(self._numbers[_CHECKPOINT]),
            "resumed": int(self._numbers[_RESUMED]),
            "through": bool(self._numbers[_THROUGH]),
            **json.loads(self._memory[_HALF + 8 : _HALF + 8 + size] or b"{}"),
        }


def train(directory: Path, epochs: int, told: Told) -> None:
    """Train up to an epoch, two steps each: the first step is saved and waited for, then every third beside it."""
    model, optimizer, scheduler = make_training()
    losses: dict[int, float] = {}
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, keep=3, sinks=()) as run:
        told.begun(run)
        for _ in run.epochs(epochs):
            for _ in run.batches(range(2)):
                told.done(run, losses)
                loss = train_step(model, optimizer, scheduler)
                run.log(loss=loss)
                losses[run.global_step] = loss.item()
                if run.global_step == 1:
                    run.save(wait=True)
            told.done(run, losses)
    told.done(run, losses)
    told.through(digest([model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), torch.get_rng_state()]))


def digest(state: Any) -> str:
    """Of everything that training changes."""
    total = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        elif isinstance(value, dict):
            take(list(value.items()))
        elif isinstance(value, (list, tuple)):
            total.update(f"{type(value).__name__} {len(value)}".encode())
            for each in value:
                take(each)
        else:
            total.update(repr(value).encode())

    take(state)
    return total.hexdigest()
