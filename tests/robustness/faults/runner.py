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

    from tests.robustness.faults.fixtures import Fixtures, Violation

_BATCH = 60  # the server of forks makes some calls for each, and must stay far below the one that strace hits


@dataclass(frozen=True)
class Worker:
    """Two servers: one whose children are harmed, and one whose children resume; and what they are judged by."""

    fixtures: Fixtures
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
    run: Callable[[Worker, Path], tuple[Counter[str], list[Violation]]]
    strace: tuple[str, ...] = ()


@dataclass
class Tally:
    """What came of many trials.

    Attributes:
        count: Of what was done.
        findings: What should not be, with the trial's name.
    """

    count: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, Violation]] = field(default_factory=list)

    def add(self, name: str, count: Counter[str], findings: list[Violation]) -> None:
        """Count one trial in."""
        self.count += count
        self.findings += [(name, finding) for finding in findings]


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[Server]]:
    """Servers of forks, which take some seconds to load torch."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(each) for each in [Server() for _ in range(count)]]


def drive(trials: Sequence[Trial], workers: Sequence[Worker], folder: Path, tally: Tally) -> None:
    """Run all, as many at a time as there are workers; what one leaves is kept where something was found."""
    waiting: queue.SimpleQueue[list[Trial]] = queue.SimpleQueue()
    for options in dict.fromkeys(trial.strace for trial in trials):
        same = [trial for trial in trials if trial.strace == options]
        for begin in range(0, len(same), _BATCH):
            waiting.put(same[begin : begin + _BATCH])
    broken: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            while not broken:
                _batch(waiting.get_nowait(), worker, folder, tally)
        except queue.Empty:
            return
        except BaseException as error:  # noqa: BLE001 - raised below
            broken.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]


def _batch(trials: list[Trial], worker: Worker, folder: Path, tally: Tally) -> None:
    options = trials[0].strace
    with worker.harmed.traced(*options) if options else contextlib.nullcontext():
        for trial in trials:
            place = folder / trial.name
            place.mkdir()
            count, findings = trial.run(worker, place / "run")
            tally.add(trial.name, count, findings)
            if not findings:
                shutil.rmtree(place)
