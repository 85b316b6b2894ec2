"""Trace of one run: effective series and the inputs of every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = "rehearsal.jsonl"


@dataclass(frozen=True)
class Step:
    """One step; every number is a fingerprint, except the learning rates.

    Attributes:
        weights: After the step: eight hexadecimal digits for each tensor, in the order of the trace's ``names``.
        optimizer: The optimizers' state after the step, eight digits for each parameter.
        lr: The learning rate of each group after the step (and after the scheduler's, if that came first).
        rng: The global generators after the step.
        batch: The batches of the step; ``None`` if the loop does not take them from the run.
        before: The inputs of the step: ``rng``, the state of each ``untracked`` object, and the user's ``values``: a
            number as text, a tensor or a container as kind and fingerprint.
        objects: The state after the step of the objects that were handed to the run, eight digits for each entry.
        position: The number of the latest batch among those that the process has drawn in this pass, from 0.
        counters: The integers that the user's loops assign anew in each iteration, after the step.
    """

    weights: str
    optimizer: str
    lr: list[float]
    rng: Mapping[str, int]
    batch: int | None
    before: Mapping[str, Mapping[str, Any]]
    objects: str = ""
    position: int | None = None
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AttemptStart:
    """The state of an attempt when its first step began, which should be that after ``step`` steps."""

    step: int
    weights: str


@dataclass(frozen=True)
class Trace:
    """The trace of one run.

    Attributes:
        name: The name of its directory.
        started_at: Unix seconds.
        series: The effective series, by key.
        steps: The effective steps.
        attempts: The attempts, in order.
        names: The names of the tensors in ``weights``, the parameters in ``optimizer`` and the entries in ``objects``.
        kills: The steps at which it was killed, each with the step from which the next attempt resumed.
        untracked: Kind and label of each untracked object, by name.
        first_checkpoint: The step of the first checkpoint; ``None`` if there was none.
    """

    name: str
    started_at: float
    series: Mapping[str, list[tuple[int, float]]]
    steps: Mapping[int, Step]
    attempts: tuple[AttemptStart, ...]
    kills: tuple[tuple[int, int], ...]
    names: Mapping[str, list[str]]
    untracked: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    first_checkpoint: int | None = None


def read(directory: Path) -> Trace:
    """Read the journal of a run and the file of its probe."""
    steps: dict[int, Step] = {}
    attempts: list[AttemptStart] = []
    killed: list[int] = []
    resumed: list[int] = []
    untracked: dict[str, dict[str, str]] = {}
    names: dict[str, list[str]] = {}
    for line in map(orjson.loads, (directory / NAME).read_bytes().splitlines()):
        if "attempt" in line:
            attempts.append(AttemptStart(line["attempt"], line["weights"]))
            resumed += [line["attempt"]] * (len(killed) - len(resumed))
            steps = {number: step for number, step in steps.items() if number <= line["attempt"]}
        elif "start" in line:
            attempts[-1] = AttemptStart(attempts[-1].step, line["start"])
        elif "killed" in line:
            killed.append(line["killed"])
        elif "untracked" in line:
            untracked |= line["untracked"]
        elif "names" in line:
            names = line["names"]
        else:
            number = line.pop("step")
            steps[number] = Step(**line)
    lines = list(journal.read(directory / journal.NAME))
    saved = [line.step for line in lines if line.event == "checkpoint"]
    return Trace(
        directory.name,
        lines[0].time,
        journal.series(directory),
        steps,
        tuple(attempts),
        tuple(zip(killed, resumed, strict=False)),
        names,
        untracked,
        min(saved, default=None),
    )
