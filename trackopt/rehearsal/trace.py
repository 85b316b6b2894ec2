"""Trace of one run: effective series and the inputs of every step."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import orjson

from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

NAME = "rehearsal.jsonl"
_STEP = re.compile(rb'^\{"step":(\d+)', re.MULTILINE)
_TAIL_BYTES = 1 << 20
_ATTEMPT = ("weights", "optimizer", "dtypes", "loaders")
OBSERVED = "training"  # the directory of a training that is observed from outside


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
            number as text, a tensor or a container as kind and fingerprint. If the training is observed from outside,
            also ``lr``, the positions of the ``schedulers``, and in ``forward`` the number of ``passes``, the
            fingerprints of their ``inputs`` and those of the tensors in the batch that was ``fetched`` last.
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
    """The state of an attempt when its first step began, which should be that after ``step`` steps.

    Attributes:
        step: The number of steps that the weights are the result of.
        weights: As in `Step`.
        optimizer: As in `Step`.
        dtypes: The type of each buffer of the optimizers, such as ``exp_avg: float32``, if observed from outside.
        loaders: The number of workers of each loader, if observed from outside.
    """

    step: int
    weights: str
    optimizer: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    loaders: tuple[int, ...] = ()


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
        failure: Why the observer stopped before the training ended.
        dtypes: The type of each buffer of the optimizers at the end, if it is observed from outside.
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
    failure: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def until(self, step: int) -> Trace:
        """Return the trace without later steps."""
        series = {key: [point for point in points if point[0] <= step] for key, points in self.series.items()}
        steps = {number: each for number, each in self.steps.items() if number <= step}
        return replace(self, series=series, steps=steps)


def join(fingerprints: Iterable[int]) -> str:
    """Write fingerprints as eight hexadecimal digits each."""
    return "".join(f"{crc:08x}" for crc in fingerprints)


def write(directory: Path, **line: Any) -> None:
    """Append a line to the file of a training that is observed from outside."""
    directory.mkdir(exist_ok=True)
    with (directory / NAME).open("ab") as file:
        file.write(orjson.dumps(line) + b"\n")


def find_step(directory: Path, weights: str) -> int:
    """Return the number of steps after which an earlier attempt had these weights.

    Of several such steps, the latest at which it saved something; if there is none, the step of its latest save.
    """
    if not (directory / NAME).exists():
        return 0
    saved, equal = {0}, set()
    for line in _lines(directory):
        if line.get("weights") == weights:
            equal.add(line["step"] if "step" in line else line["attempt"])
        elif "saved" in line:
            saved.add(line["saved"])
    return max(equal & saved or equal or saved)


def latest_step(directory: Path) -> int:
    """Return the step of the last record of a training that is observed from outside."""
    with (directory / NAME).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        steps = _STEP.findall(file.read())
    return int(steps[-1]) if steps else 0


def read(directory: Path) -> Trace:
    """Read the file of a run's probe, and its journal if it has one."""
    steps: dict[int, Step] = {}
    attempts: list[AttemptStart] = []
    killed: list[int] = []
    resumed: list[int] = []
    saved: list[int] = []
    losses: dict[int, list[float]] = {}
    about: dict[str, Any] = {"untracked": {}, "names": {}, "failure": "", "dtypes": {}}
    for line in _lines(directory):
        if "attempt" in line:
            start = line.pop("attempt")
            attempts.append(AttemptStart(start, **{key: line[key] for key in _ATTEMPT if key in line}))
            resumed += [start] * (len(killed) - len(resumed))
            steps = {number: step for number, step in steps.items() if number <= start}
        elif "start" in line:
            attempts[-1] = AttemptStart(attempts[-1].step, line["start"])
        elif "step" in line:
            number = line.pop("step")
            losses[number] = line.pop("loss", [])
            steps[number] = Step(**line)
        elif "untracked" in line:
            about["untracked"] |= line["untracked"]
        else:
            killed += [line["killed"]] if "killed" in line else []
            saved += [line["saved"]] if "saved" in line else []
            about |= {key: line[key] for key in ("names", "failure", "dtypes") if key in line}
    series = {"loss": [(number, losses[number][-1]) for number in sorted(steps) if losses[number]]}
    started_at = 0.0
    if (directory / journal.NAME).exists():
        lines = list(journal.read(directory / journal.NAME))
        saved = [line.step for line in lines if line.event == "checkpoint"]
        series, started_at = journal.series(directory), lines[0].time
    return Trace(
        name=directory.name,
        started_at=started_at,
        series=series,
        steps=steps,
        attempts=tuple(attempts),
        kills=tuple(zip(killed, resumed, strict=False)),
        first_checkpoint=min(saved, default=None),
        **about,
    )


def _lines(directory: Path) -> Iterator[dict[str, Any]]:
    """Read the complete lines of a probe's file; a kill may have cut the last one."""
    for line in (directory / NAME).read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield orjson.loads(line)
