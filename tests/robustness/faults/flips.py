"""A byte that is not what was written: in each region of a checkpoint, and in each line of the journal."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections import Counter
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.robustness.faults.fixtures import EPOCHS, Violation, flip, losses, step_of
from tests.robustness.faults.runner import Trial, Worker
from trackopt import journal
from trackopt.rundir.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.robustness.faults.fixtures import Fixtures

_LOCAL, _ENTRY, _DESCRIPTOR = 30, 46, 16  # bytes of a zip's structures


def trials(fixtures: Fixtures, seed: int, each: int) -> list[Trial]:
    """So many flips in each region."""
    random, found = Random(seed), []
    checkpoint = list(list_checkpoints(fixtures.sound).values())[-1]
    for name, region in _regions(checkpoint):
        for offset in sorted(random.sample(region, min(each, len(region)))):
            run = partial(_in_checkpoint, offset, 1 << random.randrange(8), name.endswith("data"))
            found.append(Trial(f"flip-{name.replace('/', '.')}-{offset}", run))
    for name, line, region in _lines(fixtures.sound / journal.NAME):
        for offset in sorted(random.sample(region, min(each, len(region)))):
            run = partial(_in_journal, offset, 1 << random.randrange(8), line)
            found.append(Trial(f"flip-{name}-{offset}", run))
    return found


def _regions(path: Path) -> Iterator[tuple[str, range]]:
    """Every region of the zip that is not empty."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as zipped:
        infos, entry = zipped.infolist(), zipped.start_dir
    for info in infos:
        name, extra = struct.unpack_from("<2H", content, info.header_offset + 26)
        stops = [info.header_offset, _LOCAL, name, extra, info.file_size, _DESCRIPTOR if info.file_size else 0]
        yield from _parts(info.filename, ("header", "name", "padding", "data", "descriptor"), stops)
    for info in infos:
        size = _ENTRY + sum(struct.unpack_from("<3H", content, entry + 28))
        yield f"{info.filename}-entry", range(entry, entry + size)
        entry += size
    yield "end", range(entry, len(content))


def _parts(name: str, parts: tuple[str, ...], stops: list[int]) -> Iterator[tuple[str, range]]:
    begin = stops[0]
    for part, size in zip(parts, stops[1:], strict=True):
        if size:
            yield f"{name}-{part}", range(begin, begin + size)
        begin += size


def _lines(path: Path) -> Iterator[tuple[str, journal.Line, range]]:
    """Every line, and its newline by itself."""
    for number, line in enumerate(journal.read(path)):
        name = f"line-{number}-{line.event or 'record'}"
        yield name, line, range(line.start_offset, line.end_offset - 1)
        yield f"{name}-newline", line, range(line.end_offset - 1, line.end_offset)


def _in_checkpoint(
    offset: int, bit: int, sure: bool, worker: Worker, directory: Path
) -> tuple[Counter[str], list[Violation]]:
    """The one before it is gone on from, unless it means the same as before."""
    shutil.copytree(worker.fixtures.sound, directory, symlinks=True)
    _, before, newest = list_checkpoints(directory).values()
    flip(newest, offset, bit)
    found = worker.fixtures.judge(
        worker.sound, directory, checkpoint=step_of(before), records=losses(worker.fixtures.sound)
    )
    aside = newest.with_name(f"{newest.name}.damaged").exists()
    if sure and not aside:
        found.append(Violation("other results", "data that was changed was taken for sound"))
    return Counter(["flips in a checkpoint", "set aside" if aside else "flips that change nothing"]), found


def _in_journal(
    offset: int, bit: int, touched: journal.Line, worker: Worker, directory: Path
) -> tuple[Counter[str], list[Violation]]:
    """At most the line is lost, and with its newline the next one."""
    shutil.copytree(worker.fixtures.sound, directory, symlinks=True)
    path = directory / journal.NAME
    whole = list(journal.read(path))
    spoilt = {touched.start_offset, touched.end_offset} if offset == touched.end_offset - 1 else {touched.start_offset}
    flip(path, offset, bit)
    kept = [line for line in whole if line.start_offset not in spoilt]
    records = [(line.step, line.metrics["loss"]) for line in kept if "loss" in line.metrics]
    newest = step_of(list(list_checkpoints(directory).values())[-1])
    found = worker.fixtures.judge(worker.sound, directory, checkpoint=newest, records=records, series=False)
    now = list(journal.read(path))
    if any(line not in now for line in kept):
        found.append(Violation("records lost", "a line that was not touched reads differently"))
    gone = {line.step for line in whole if line.start_offset in spoilt}
    if touched.event != "resume" and not _points(worker, gone) <= set(journal.series(directory)["loss"]):
        found.append(Violation("other results", "the series lacks points of lines that were not touched"))
    return Counter(["flips in the journal"]), found


def _points(worker: Worker, gone: set[int]) -> set[tuple[int, float]]:
    return {point for point in worker.fixtures.whole[EPOCHS].series["loss"] if point[0] not in gone}
