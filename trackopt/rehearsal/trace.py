"""What is known of one rehearsed run: its effective series, and what each of its steps came from."""

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
    """One step; every number in it is a fingerprint, but the learning rates.

    Attributes:
        weights: After the step: eight hexadecimal digits for each tensor, in the order of the trace's ``names``.
        optimizer: The optimizers' state after the step, the same for each parameter.
        lr: Of every group after the step (and after the scheduler's, if that came first).
        rng: The global generators after the step.
        batch: The batches that it was made from; ``None`` where the loop takes them from elsewhere than the run.
        before: What it began with: ``rng``, the state of each untracked object, and the user's
            ``numbers`` as text.
    """

    weights: str
    optimizer: str
    lr: list[float]
    rng: Mapping[str, int]
    batch: int | None
    before: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class AttemptStart:
    """What an attempt had before its first step: the state after ``step`` steps, as it was restored."""

    step: int
    weights: str


@dataclass(frozen=True)
class Trace:
    """One run.

    Attributes:
        name: Of its directory.
        started_at: Unix seconds.
        series: The effective ones, by key.
        steps: The effective steps.
        attempts: The attempts, in order.
        names: Of the ``weights`` and of the ``optimizer``'s parameters.
        kills: The steps at which it was killed, each with the step that the next attempt went on from.
        strays: Kind and label of what the script keeps to itself, by name.
        first_checkpoint: The step of the first one that was taken; ``None`` if none was.
    """

    name: str
    started_at: float
    series: Mapping[str, list[tuple[int, float]]]
    steps: Mapping[int, Step]
    attempts: tuple[AttemptStart, ...]
    kills: tuple[tuple[int, int], ...]
    names: Mapping[str, list[str]]
    strays: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    first_checkpoint: int | None = None


def read(directory: Path) -> Trace:
    """Read what a run's journal and its probe wrote."""
    steps: dict[int, Step] = {}
    lives: list[AttemptStart] = []
    killed: list[int] = []
    resumed: list[int] = []
    strays: dict[str, dict[str, str]] = {}
    names: dict[str, list[str]] = {}
    for line in map(orjson.loads, (directory / NAME).read_bytes().splitlines()):
        if "life" in line:
            lives.append(AttemptStart(line["life"], line["weights"]))
            resumed += [line["life"]] * (len(killed) - len(resumed))
            steps = {number: step for number, step in steps.items() if number <= line["life"]}
        elif "killed" in line:
            killed.append(line["killed"])
        elif "strays" in line:
            strays |= line["strays"]
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
        tuple(lives),
        tuple(zip(killed, resumed, strict=False)),
        names,
        strays,
        min(saved, default=None),
    )
