"""Long journals: the reader of columns, the reader from the end, and which records count, against plain definitions."""

import math
import os
import random
import signal

import orjson
import pytest

from trackopt import journal
from trackopt.journal import Histogram, Journal, Line
from trackopt.journal.columns import ColumnReader
from trackopt.recorder.cursor import Cursor
from trackopt.recorder.store_once import StoreOnceDelivery
from trackopt.recorder.strategies import TruncatingDelivery

KEYS = ("loss", "lr/group0", "exp_avg/group0.mean", "accuracy")
FOREIGN = (
    b"",
    b"[]",
    b'{"step":1}',
    b'{"step":"x","time":1,"metrics":{"loss":1}}',
    b'{"step":3,"time":1.5,"metrics":{"loss":null}}',
    b'{"step":3,"time":1.5,"metrics":{"loss":{"a":1}}}',
    b'{"step":3,"time":1.5,"metrics":["loss"]}',
    b'{"step":36893488147419103232,"time":1.5,"metrics":{"loss":1}}',
    b'{"step":9007199254740993,"time":1.5,"metrics":{"loss":1}}',
    b'{"metrics":{"loss":7,"new":true},"time":"4.5","step":"3"}',
    b'{"step":2.75,"time":1,"metrics":{"loss":"1.5"},"more":[1]}',
    b'{"step":2,"time":1.5,"metrics":{"loss":2},"event":"epoch"}',
    b'{"step":2,"time":1.5,"metrics":{"loss":2,"loss":3}}',
    b'{"step":2,"time":1.5,"metrics":{}}',
    b'{"event":"resume","step":1,"time":2.5,"offset":"far"}',
    b'{"event":"close","step":1,"time":2.5,"status":7}',
    b"\xff\xfe",
)


def write(path, chance, *, is_clean=False):
    """A journal with several attempts, of which some return to checkpoints of abandoned ones."""
    checkpoints = [(0, 0)]
    path.touch()
    for attempt in range(chance.randrange(1, 6)):
        writer = Journal(path)
        begin, offset = chance.choice(checkpoints) if attempt else (0, 0)
        if attempt:
            details = {} if chance.random() < 0.1 else {"offset": offset}
            writer.mark("resume", begin, **details, **({"starts_over": True} if not offset else {}))
        else:
            writer.mark("start", 0, params={"lr": 0.1})
        for step in range(begin + 1, begin + chance.randrange(2, 30)):
            write_step(writer, step, chance, is_clean=is_clean)
            if chance.random() < 0.2:
                checkpoints.append((step, writer.offset))
            if chance.random() < 0.2:
                writer.record(step, {"val_loss": chance.random(), "loss": 5.0}, step + 0.5)  # a late metric
        if chance.random() < 0.5:
            writer.mark("close", step, status="FINISHED")
        writer.close()
        if not is_clean:
            damage(path, chance)


def write_step(writer, step, chance, *, is_clean):
    values = [chance.choice((chance.random(), 3, math.nan, math.inf, -math.inf, 1e-320)) for _ in KEYS]
    metrics = dict(zip(KEYS, values, strict=True))
    if chance.random() < 0.3:
        metrics.pop(chance.choice(KEYS))
    writer.record(step, metrics, step + chance.random())
    if chance.random() < 0.1:
        writer.histograms(step, {"exp_avg/group0": Histogram([0.0, 1.0], [2, 3], -0.5, 0.75, 1.5, 2.5, 5)})
    if chance.random() < 0.15 and not is_clean:
        writer._write(chance.choice(FOREIGN) + b"\n")
    if chance.random() < 0.1:  # of an earlier version
        writer._write(orjson.dumps({"step": step, "time": 1.0, "metrics": {"loss": step}}) + b"\n")


def damage(path, chance):
    content = bytearray(path.read_bytes())
    for _ in range(chance.randrange(3)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        del content[-chance.randrange(1, 40) :]
    path.write_bytes(content)


def plain_effective(lines):
    """The definition: each resume drops what it supersedes; a return brings back the records of its checkpoint."""
    seen, kept, attempt_start = [], [], 0
    for line in lines:
        if line.event == "resume":
            offset = journal.checkpoint_offset(line)
            if offset < attempt_start:
                kept = plain_effective(earlier for earlier in seen if earlier.start_offset < offset)
            kept = [record for record in kept if not journal.superseded(record, line)]
            attempt_start = line.start_offset
        elif line.event is None:
            kept.append(line)
        seen.append(line)
    return kept


@pytest.mark.parametrize("seed", range(100))
def test_columns_are_what_the_lines_say(seed, tmp_path, monkeypatch):
    """The series, steps and damaged lines of random journals, read by two processes and in pieces."""
    monkeypatch.setattr("trackopt.journal.halves._MIN_BYTES", 0)
    chance = random.Random(seed)
    path = tmp_path / journal.NAME
    write(path, chance)
    damaged = []
    lines = list(journal.read(path, on_damage=damaged.append))
    records = journal.effective(lines)
    assert records == plain_effective(lines)
    expected = {}
    for record in records:
        for key, value in record.metrics.items():
            expected.setdefault(key, []).append((record.step, value))
    whole, pieces = ColumnReader(path, lambda _: True), ColumnReader(path, lambda key: "loss" in key)
    whole.update(parallel=True)
    content = path.read_bytes()
    for end in sorted(chance.sample(range(len(content)), 3)):
        path.write_bytes(content[:end])
        pieces.update()
    path.write_bytes(content)
    pieces.update()
    found = whole.build()
    series = {key: list(points) for key, points in found.series.items()}
    assert repr(sorted(series.items())) == repr(sorted(expected.items()))
    assert found.steps.tolist() == [record.step for record in records if record.metrics]
    assert whole.damaged == pieces.damaged == damaged
    assert whole.markers == [line for line in lines if line.event in {"start", "resume", "close"}]
    losses = {key: list(series) for key, series in pieces.build().series.items()}
    assert repr(sorted(losses.items())) == repr(sorted(item for item in expected.items() if "loss" in item[0]))


@pytest.mark.parametrize("seed", range(20))
def test_the_lines_from_the_end_are_those_from_the_beginning(seed, tmp_path, monkeypatch):
    """Whatever the blocks cut."""
    chance = random.Random(seed)
    path = tmp_path / journal.NAME
    write(path, chance)
    lines, damaged, damaged_backwards = list(journal.read(path)), [], []
    list(journal.read(path, on_damage=damaged.append))
    monkeypatch.setattr("trackopt.journal.reading._BLOCK_BYTES", chance.choice((1, 7, 100, 1000)))
    assert repr(list(journal.read_backwards(path, on_damage=damaged_backwards.append))[::-1]) == repr(lines)
    assert damaged_backwards[::-1] == damaged
    middle = lines[len(lines) // 2].start_offset
    before = [line for line in lines if line.start_offset < middle]
    assert repr(list(journal.read_backwards(path, middle))[::-1]) == repr(before)


def test_many_returns_take_no_exponential_time():
    """Each resume goes back to a checkpoint just before the previous one."""
    lines = []
    for number in range(200):
        start = 100 * number
        details = {"offset": max(0, start - 150)}
        lines.append(Line(number, 0.0, event="resume", details=details, start_offset=start, end_offset=start + 50))
        lines.append(Line(number + 1, 0.0, {"loss": 1.0}, start_offset=start + 50, end_offset=start + 100))
    assert journal.effective(lines)[-1].step == 200


@pytest.mark.parametrize("seed", range(40))
def test_a_resume_finds_the_same_records_by_reading_little(seed, tmp_path):
    """What a sink that truncates gets again, and what one that does not is compared with."""
    chance = random.Random(seed)
    path = tmp_path / journal.NAME
    write(path, chance, is_clean=True)
    lines = list(journal.read(path))
    for number, marker in enumerate(lines):
        if marker.event != "resume":
            continue
        kept = journal.effective(lines[:number])
        truncating = TruncatingDelivery(path, None, Cursor(), None)
        once = StoreOnceDelivery(path, None, Cursor(), None)
        assert repr(truncating._find_restored(marker)) == repr(truncating._find_restored_anywhere(marker))
        superseded = [record for record in kept if journal.superseded(record, marker)]
        assert repr(once._list_superseded(marker)) == repr(superseded)


def test_a_child_that_dies_is_replaced(tmp_path, monkeypatch):
    """The rest is read by the process itself."""
    monkeypatch.setattr("trackopt.journal.halves._MIN_BYTES", 0)
    monkeypatch.setattr("pickle.dump", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    path = tmp_path / journal.NAME
    writer = Journal(path)
    for step in range(1, 101):
        writer.record(step, {"loss": step})
    writer.close()
    reader = ColumnReader(path, lambda _: True)
    reader.update(parallel=True)
    assert list(reader.build().series["loss"]) == [(step, step) for step in range(1, 101)]
