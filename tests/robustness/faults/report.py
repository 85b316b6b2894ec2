"""All kinds of harm, one after the other, and their tally."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tests.robustness.faults import crashes, flips, kills, sweep
from tests.robustness.faults.fixtures import Fixtures
from tests.robustness.faults.forks import missing_tools
from tests.robustness.faults.runner import Tally, Trial, Worker, drive, servers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.robustness.faults.calls import Call
    from tests.robustness.faults.forks import Server

_LOSSES = ("checkpoints lost", "records lost", "unable to resume", "other results", "errors")


STRACE = ("killed before a system call", "refused by a system call", "cut off by a crash")
WITHOUT = ("short writes", "killed at random", "flips")
KINDS = (*(() if missing_tools() else STRACE), *WITHOUT)


@dataclass(frozen=True)
class Budget:
    """How much is tried.

    Attributes:
        seed: Of everything that is drawn.
        kills: At random moments.
        flips: In each region of a checkpoint and of the journal.
        states: For each moment of a training at which the machine may crash.
        most: Trials of each kind at most, drawn from all; ``None`` is all.
        workers: Trials at the same time.
        only: Only trials whose name has this in it.
    """

    seed: int = 0
    kills: int = 2000
    flips: int = 2
    states: int = 3
    most: int | None = None
    workers: int = 2
    only: str = ""


def prove(
    budget: Budget, kinds: Sequence[str] = KINDS, tell: Callable[[str], None] = lambda _: None
) -> tuple[Tally, Path]:
    """Do every kind of harm; the tally, and where the trials are that found something."""
    folder, tally = _scratch(), Tally()
    with servers(2 * budget.workers) as ready:
        proving = _Proving(budget, Fixtures(_made(folder / "ground"), ready[0]), ready[0], folder)
        workers = [Worker(proving.fixtures, *pair) for pair in zip(ready[::2], ready[1::2], strict=True)]
        for kind in kinds:
            chosen = [trial for trial in proving.trials(kind) if budget.only in trial.name]
            if budget.most is not None and len(chosen) > budget.most:
                chosen = Random(f"{budget.seed} {kind}").sample(chosen, budget.most)
            tell(f"{kind}: {len(chosen):,} trials")
            drive(chosen, workers, _made(folder / "trials"), tally)
    if not tally.findings:
        shutil.rmtree(folder)
    return tally, folder / "trials"


@dataclass(frozen=True)
class _Proving:
    budget: Budget
    fixtures: Fixtures
    server: Server
    folder: Path

    @cached_property
    def _calls(self) -> dict[str, list[Call]]:
        return sweep.traced(self.fixtures, self.server, _made(self.folder / "traced"))

    def trials(self, kind: str) -> list[Trial]:
        """All of one kind."""
        budget, fixtures = self.budget, self.fixtures
        if kind == "killed before a system call":
            return sweep.kills(fixtures, self._calls)
        if kind == "refused by a system call":
            return sweep.errors(fixtures, self._calls, self.folder / "traced")
        if kind == "cut off by a crash":
            return crashes.trials(fixtures, self.server, _made(self.folder / "recorded"), budget.seed, budget.states)
        if kind == "short writes":
            return sweep.short_writes(fixtures)
        if kind == "killed at random":
            return kills.trials(budget.seed, budget.kills)
        return flips.trials(fixtures, budget.seed, budget.flips)


def _scratch() -> Path:
    """In memory where that is possible, since fsync on a disk takes most of the time."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="trackopt-faults-", dir=memory if os.access(memory, os.W_OK) else None))


def lines(tally: Tally) -> list[str]:
    """The tally, and what should not be: zero of each."""
    losses = {kind: sum(finding.kind == kind for _, finding in tally.findings) for kind in _LOSSES}
    without = [f"  without {', '.join(STRACE)}: {missing_tools()}"] if missing_tools() else []
    rows = itertools.chain(tally.count.items(), losses.items())
    return [*(f"  {name:<26} {number:>7,}" for name, number in rows), *without]


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
