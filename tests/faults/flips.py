"""A byte that is not what was written: in each region of a checkpoint, and in each line of the journal."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections import Counter
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.faults.ground import EPOCHS, Finding, flip, losses, step_of
from tests.faults.trials import Lane, Trial
from trackopt import journal, locations

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.faults.ground import Ground

_LOCAL, _ENTRY, _DESCRIPTOR = 30, 46, 16  # bytes of a zip's structures


def trials(ground: Ground, seed: int, each: int) -> list[Trial]:
    """So many flips in each region."""
    random, found = Random(seed), []
    checkpoint = list(locations.checkpoints(ground.sound).values())[-1]
    for name, region in _regions(checkpoint):
        for offset in sorted(random.sample(region, min(each, len(region)))):
            run = partial(_in_checkpoint, offset, 1 << random.randrange(8), name.endswith("data"))
            found.append(Trial(f"flip-{name.replace('/', '.')}-{offset}", run))
    for name, line, region in _lines(ground.sound / journal.NAME):
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
    offset: int, bit: int, sure: bool, lane: Lane, directory: Path
) -> tuple[Counter[str], list[Finding]]:
    """The one before it is gone on from, unless it means the same as before."""
    shutil.copytree(lane.ground.sound, directory, symlinks=True)
    _, before, newest = locations.checkpoints(directory).values()
    flip(newest, offset, bit)
    found = lane.ground.judge(lane.sound, directory, checkpoint=step_of(before), records=losses(lane.ground.sound))
    aside = newest.with_name(f"{newest.name}.damaged").exists()
    if sure and not aside:
        found.append(Finding("other results", "data that was changed was taken for sound"))
    return Counter(["flips in a checkpoint", "set aside" if aside else "flips that change nothing"]), found


def _in_journal(
    offset: int, bit: int, touched: journal.Line, lane: Lane, directory: Path
) -> tuple[Counter[str], list[Finding]]:
    """At most the line is lost, and with its newline the next one."""
    shutil.copytree(lane.ground.sound, directory, symlinks=True)
    path = directory / journal.NAME
    whole = list(journal.read(path))
    spoilt = {touched.start_offset, touched.end_offset} if offset == touched.end_offset - 1 else {touched.start_offset}
    flip(path, offset, bit)
    kept = [line for line in whole if line.start_offset not in spoilt]
    records = [(line.step, line.metrics["loss"]) for line in kept if "loss" in line.metrics]
    newest = step_of(list(locations.checkpoints(directory).values())[-1])
    found = lane.ground.judge(lane.sound, directory, checkpoint=newest, records=records, series=False)
    now = list(journal.read(path))
    if any(line not in now for line in kept):
        found.append(Finding("records lost", "a line that was not touched reads differently"))
    gone = {line.step for line in whole if line.start_offset in spoilt}
    if touched.event != "resume" and not _points(lane, gone) <= set(journal.series(directory)["loss"]):
        found.append(Finding("other results", "the series lacks points of lines that were not touched"))
    return Counter(["flips in the journal"]), found


def _points(lane: Lane, gone: set[int]) -> set[tuple[int, float]]:
    return {point for point in lane.ground.whole[EPOCHS].series["loss"] if point[0] not in gone}
