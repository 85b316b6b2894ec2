"""What every kind of harm is made of: trials, run side by side."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.robustness.faults.forks import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.robustness.faults.fixtures import Finding, Ground

_BATCH = 60  # the server of forks makes some calls for each, and must stay far below the one that strace hits


@dataclass(frozen=True)
class Lane:
    """Two servers: one whose children are harmed, and one whose children resume; and what they are judged by."""

    ground: Ground
    harmed: Server
    sound: Server


@dataclass(frozen=True)
class Trial:
    """One case.

    Attributes:
        name: By which it is asked for again.
        run: Does it in a directory that is not there yet; what it counts as, and what should not be.
        strace: The options of strace on those that are harmed; none is without.
    """

    name: str
    run: Callable[[Lane, Path], tuple[Counter[str], list[Finding]]]
    strace: tuple[str, ...] = ()


@dataclass
class Tally:
    """What came of many trials.

    Attributes:
        count: Of what was done.
        findings: What should not be, with the trial's name.
    """

    count: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, Finding]] = field(default_factory=list)

    def add(self, name: str, count: Counter[str], findings: list[Finding]) -> None:
        """Count one trial in."""
        self.count += count
        self.findings += [(name, finding) for finding in findings]


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[Server]]:
    """Servers of forks, which take some seconds to load torch."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(each) for each in [Server() for _ in range(count)]]


def drive(trials: Sequence[Trial], lanes: Sequence[Lane], folder: Path, tally: Tally) -> None:
    """Run all, as many at a time as there are lanes; what one leaves is kept where something was found."""
    waiting: queue.SimpleQueue[list[Trial]] = queue.SimpleQueue()
    for options in dict.fromkeys(trial.strace for trial in trials):
        alike = [trial for trial in trials if trial.strace == options]
        for begin in range(0, len(alike), _BATCH):
            waiting.put(alike[begin : begin + _BATCH])
    broken: list[BaseException] = []

    def work(lane: Lane) -> None:
        try:
            while not broken:
                _batch(waiting.get_nowait(), lane, folder, tally)
        except queue.Empty:
            return
        except BaseException as error:  # noqa: BLE001 - raised below
            broken.append(error)

    workers = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if broken:
        raise broken[0]


def _batch(trials: list[Trial], lane: Lane, folder: Path, tally: Tally) -> None:
    options = trials[0].strace
    with lane.harmed.traced(*options) if options else contextlib.nullcontext():
        for trial in trials:
            place = folder / trial.name
            place.mkdir()
            count, findings = trial.run(lane, place / "run")
            tally.add(trial.name, count, findings)
            if not findings:
                shutil.rmtree(place)
