"""Crashes of the machine: what a training did to the disk, cut off at each place, and resumed from what may be left."""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.robustness.faults.disk import Disk
from tests.robustness.faults.replay import TRACE, Line, Replay, lines
from tests.robustness.faults.runner import Trial, Worker
from tests.robustness.faults.server import Case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.robustness.faults.fixtures import Fixtures, Scenario, Violation
    from tests.robustness.faults.forks import Server


def recorded(start: Scenario, server: Server, folder: Path) -> tuple[Disk, list[Line], Path]:
    """A training under strace: the disk before it, the log of what it did, and the folder in which it did that."""
    place = folder / "place"
    place.mkdir(parents=True)
    start.place(place / "run")
    before, log = Disk(place), folder / "log"
    with server.traced(*TRACE, "-o", str(log)):
        done = server.ask(Case(str(place / "run"), start.epochs, log=True))
    assert done.through, done
    return before, list(lines(log.read_text())), place


def trials(fixtures: Fixtures, server: Server, folder: Path, seed: int, states: int) -> list[Trial]:
    """So many states for each moment at which the disk was changed, or something was acknowledged."""
    found = []
    for name, start in fixtures.starts.items():
        before, log, place = recorded(start, server, folder / name)
        replay = Replay(before, place, start)
        moments = [moment for moment, line in enumerate(log) if replay.take(*line)]
        found += [
            Trial(
                f"crash-{name}-{moment}-{seed}-{number}",
                partial(_crashed, (before, log[: moment + 1], place, start), f"{seed}-{name}-{moment}-{number}"),
            )
            for moment in moments
            for number in range(states)
        ]
    return found


def _crashed(
    story: tuple[Disk, list[Line], Path, Scenario], seed: str, worker: Worker, directory: Path
) -> tuple[Counter[str], list[Violation]]:
    replay = Replay(story[0], *story[2:])
    for line in story[1]:
        replay.take(*line)
    replay.disk.after_crash(Random(seed), directory.parent)
    judged = worker.fixtures.judge(worker.sound, directory, checkpoint=replay.checkpoint, records=replay.records)
    return Counter(["crash states"]), judged
