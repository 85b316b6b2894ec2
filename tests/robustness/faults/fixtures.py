"""Where cases begin, and how they are judged: somebody resumes, trains to the end, and everything is compared."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.robustness.faults.server import Case
from trackopt import journal
from trackopt.archive import verify
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.rundir.directory import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.robustness.faults.forks import Outcome, Server

EPOCHS = 4  # of two steps each
LONG = 60  # where a training is killed many times


@dataclass(frozen=True)
class Scenario:
    """A directory in which a training is started.

    Attributes:
        directory: To be copied; ``None`` where there is none yet.
        epochs: Where the attempt that is harmed ends.
        checkpoint: The step of its newest sound checkpoint.
        records: Step and loss of the records in it.
    """

    directory: Path | None
    epochs: int
    checkpoint: int = 0
    records: tuple[tuple[float, float], ...] = ()

    def place(self, directory: Path) -> None:
        """Make it that of a run."""
        if self.directory is not None:
            shutil.copytree(self.directory, directory, symlinks=True)


@dataclass(frozen=True)
class Violation:
    """What should not be.

    Attributes:
        kind: ``checkpoints lost``, ``records lost``, ``unable to resume``, ``other results`` or ``errors``.
        text: In words.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Whole:
    """A training to which nothing happened.

    Attributes:
        digest: Of its state at the end.
        series: Its journal's.
        seconds: How long it took.
    """

    digest: str
    series: dict[str, list[tuple[int, float]]]
    seconds: float


class Fixtures:
    """Trainings that nothing happened to, and directories to begin in.

    Args:
        folder: Where they are made.
        server: Who trains.

    Attributes:
        whole: By the number of epochs.
        starts: ``fresh``, and ``resumed``: its newest checkpoint is damaged, a killed writer left its part, and the
            journal ends in a torn line.
        sound: A directory with three sound checkpoints and a whole journal of two attempts.
    """

    def __init__(self, folder: Path, server: Server) -> None:
        self.whole = {}
        for epochs in (2, EPOCHS, LONG):
            begin = time.monotonic()
            done = server.ask(Case(str(folder / f"whole-{epochs}"), epochs))
            assert done.through, done
            seconds = time.monotonic() - begin
            self.whole[epochs] = Whole(done.digest, journal.series(folder / f"whole-{epochs}"), seconds)
        self.sound = folder / "sound"
        for epochs in (1, 2):
            assert server.ask(Case(str(self.sound), epochs)).through
        resumed = folder / "resumed"
        shutil.copytree(self.sound, resumed, symlinks=True)
        _, newest_sound, newest = list_checkpoints(resumed).values()
        flip(newest, newest.stat().st_size // 2)
        (resumed / CHECKPOINTS / ".step-00000006.pt.part").write_bytes(bytes(5000))
        with (resumed / journal.NAME).open("ab") as file:
            file.write(b'{"step":5,"ti')
        self.starts = {
            "fresh": Scenario(None, 2),
            "resumed": Scenario(resumed, EPOCHS, step_of(newest_sound), tuple(losses(resumed))),
        }

    def judge(
        self,
        server: Server,
        directory: Path,
        *,
        checkpoint: int,
        records: Iterable[Iterable[float]],
        epochs: int = EPOCHS,
        series: bool = True,
    ) -> list[Violation]:
        """Resume, train to the end, and compare.

        Args:
            server: Who trains.
            directory: As the harm left it.
            checkpoint: The step from which it must go on, or from a later one.
            records: Step and loss of those that must be in the journal.
            epochs: Where it ends.
            series: Whether the series must be those of the training that nothing happened to.
        """
        before = _content(directory / journal.NAME)
        done = server.ask(Case(str(directory), epochs))
        found = list(_missing(directory, before, records))
        if not done.through:
            return [*found, Violation("unable to resume", done.error or done.ill or f"ended with {done.status}")]
        if done.resumed < checkpoint:
            text = f"went on from step {done.resumed}, though {checkpoint} was on the disk; {done.messages}"
            found.append(Violation("checkpoints lost", text))
        if done.digest != self.whole[epochs].digest:
            found.append(Violation("other results", "the state at the end is another"))
        if series and journal.series(directory) != self.whole[epochs].series:
            found.append(Violation("other results", "the series are others"))
        left = [path.name for path in (directory / CHECKPOINTS).glob(".*")]
        bad = [path.name for path in list_checkpoints(directory).values() if verify.verify_checkpoint(path)]
        if left or bad:
            found.append(Violation("other results", f"left behind: {left}; damaged: {bad}"))
        return found


def flip(path: Path, offset: int, bits: int = 0xFF) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ bits
        file.seek(offset)
        file.write(bytes([byte]))


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def losses(directory: Path) -> list[tuple[float, float]]:
    """Step and loss of every record, superseded ones too."""
    path = directory / journal.NAME
    return [(line.step, line.metrics["loss"]) for line in journal.read(path) if "loss" in line.metrics]


def _missing(directory: Path, before: bytes, records: Iterable[Iterable[float]]) -> Iterable[Violation]:
    if not _content(directory / journal.NAME).startswith(before):
        yield Violation("records lost", "the journal was changed where it was written already")
    gone = {tuple(record) for record in records} - set(losses(directory))
    if gone:
        yield Violation("records lost", f"steps {sorted(int(step) for step, _ in gone)}")


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def told(outcome: Outcome, start: Scenario) -> dict:
    """What must be there after an attempt: what it began with, and what it told to be done."""
    records = [*start.records, *map(tuple, outcome.records)]
    return {"checkpoint": max(outcome.checkpoint, start.checkpoint), "records": records}
