"""SIGKILL at random moments: a directory is trained in over and over, until the training is through."""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.robustness.faults.fixtures import LONG, Violation
from tests.robustness.faults.runner import Trial, Worker
from tests.robustness.faults.server import Case

if TYPE_CHECKING:
    from pathlib import Path

_EACH = 20


def trials(seed: int, kills: int) -> list[Trial]:
    """So many kills, in trials of twenty."""
    return [
        Trial(f"random-{seed}-{first}", partial(_killed, f"{seed}-{first}", min(_EACH, kills - first)))
        for first in range(0, kills, _EACH)
    ]


def _killed(seed: str, kills: int, worker: Worker, directory: Path) -> tuple[Counter[str], list[Violation]]:
    """Kill so often; whenever a training is through, another one begins."""
    random, count, findings = Random(seed), Counter[str](), []
    while count["random kills"] < kills:
        place = directory.with_name(f"run-{count['trainings']}")
        count["trainings"] += 1
        findings += _trained(random, kills, count, worker, place)
    return count, findings


def _trained(random: Random, kills: int, count: Counter[str], worker: Worker, directory: Path) -> list[Violation]:
    """One training: killed until it is through or enough are killed, and ended in peace."""
    checkpoint, records, findings = 0, [], []
    through = False
    while count["random kills"] < kills and not through:
        delay = random.uniform(0, worker.fixtures.whole[LONG].seconds / 3)
        done = worker.harmed.ask(Case(str(directory), LONG, kill_after=delay))
        through = done.through
        count["random kills"] += done.status < 0
        if 0 <= done.resumed < checkpoint:
            findings.append(Violation("checkpoints lost", f"went on from {done.resumed}, not {checkpoint}"))
        if done.error or done.ill:
            findings.append(Violation("unable to resume", done.error or done.ill))
        checkpoint, records = max(checkpoint, done.checkpoint), records + done.records
    return findings + worker.fixtures.judge(
        worker.sound, directory, checkpoint=checkpoint, records=records, epochs=LONG
    )
