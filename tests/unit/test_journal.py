import math
import os

import pytest

from tests.helpers.processes import run_script
from trackopt import RunError, journal
from trackopt.journal import Histogram, Journal, Line


@pytest.fixture
def path(tmp_path):
    return tmp_path / journal.NAME


def test_what_is_recorded_is_read_back(path):
    """Records and markers come back in order, with their offsets, non-finite numbers included."""
    writer = Journal(path)
    writer.mark("start", 0, attempt=1)
    writer.record(1, {"loss": 0.5, "bad": math.nan, "up": math.inf, "down": -math.inf})
    writer.close()
    start, record = journal.read(path)
    assert (start.event, start.step, start.details) == ("start", 0, {"attempt": 1})
    assert record.metrics["loss"] == 0.5
    assert math.isnan(record.metrics["bad"])
    assert (record.metrics["up"], record.metrics["down"]) == (math.inf, -math.inf)
    assert (start.start_offset, start.end_offset, record.end_offset) == (0, record.start_offset, path.stat().st_size)
    assert [line.end_offset for line in journal.read(path, record.start_offset)] == [record.end_offset]


def test_histograms_are_read_back(path):
    """They are records of their own: the series know nothing of them, and a resume supersedes them."""
    histogram = Histogram([0.0, 1.0], [2, 3], -0.5, 0.75, 1.5, 2.5, 5)
    writer = Journal(path)
    writer.record(1, {"loss": 1.0})
    writer.histograms(1, {"exp_avg/group0": histogram})
    writer.close()
    lines = list(journal.read(path))
    assert (lines[1].histograms, lines[1].metrics, lines[1].event) == ({"exp_avg/group0": histogram}, {}, None)
    assert journal.series(path) == {"loss": [(1, 1.0)]}
    assert journal.effective([*lines, Line(0, 0.0, event="resume")]) == []


def test_a_torn_line_is_skipped_and_spoils_no_other(path):
    """A line that a killed process left half-written is passed over, before and after a new attempt appends."""
    writer = Journal(path)
    writer.record(1, {"loss": 1.0})
    writer.close()
    with path.open("ab") as file:
        file.write(b'{"step":2,"time":1.0,"metr')
    assert [line.step for line in journal.read(path)] == [1]
    before = path.read_bytes()
    writer = Journal(path)
    writer.record(3, {"loss": 3.0})
    writer.close()
    assert [line.step for line in journal.read(path)] == [1, 3]
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"step":"x","time":1}',
        b'{"step":1,"time":1,"metrics":[1]}',
        b'{"step":1,"time":1,"histograms":{"a":{}}}',
    ],
)
def test_a_foreign_line_is_skipped(path, line):
    """What no version of the journal wrote is passed over."""
    path.write_bytes(line + b'\n{"step":1,"time":1.0,"metrics":{"loss":2}}\n')
    assert [entry.metrics for entry in journal.read(path)] == [{"loss": 2.0}]


def test_a_resume_supersedes_the_future_that_it_abandons():
    """Records behind the step count no more, nor those of the step itself that came after its checkpoint."""
    lines = [
        Line(1, 0.0, {"loss": 1.0}, start_offset=0),
        Line(2, 0.0, {"loss": 2.0}, start_offset=10),
        Line(2, 0.0, {"accuracy": 0.5}, start_offset=20),
        Line(3, 0.0, {"loss": 3.0}, start_offset=30),
        Line(2, 0.0, event="resume", details={"offset": 20}, start_offset=40),
        Line(3, 0.0, {"loss": 4.0}, start_offset=50),
    ]
    assert [(line.step, line.metrics) for line in journal.effective(lines)] == [
        (1, {"loss": 1.0}),
        (2, {"loss": 2.0}),
        (3, {"loss": 4.0}),
    ]


def test_a_return_to_an_abandoned_future_brings_its_records_back():
    """What counts is the history of the checkpoint that a run went on from, whatever was tried in between."""
    lines = [
        Line(1, 0.0, {"loss": 1.0}, start_offset=0),
        Line(2, 0.0, {"loss": 2.0}, start_offset=10),
        Line(3, 0.0, {"loss": 3.0}, start_offset=20),
        Line(1, 0.0, event="resume", details={"offset": 10}, start_offset=30),
        Line(2, 0.0, {"loss": 20.0}, start_offset=40),
        Line(0, 0.0, event="resume", details={"offset": 0}, start_offset=50),
        Line(1, 0.0, {"loss": 10.0}, start_offset=60),
        Line(2, 0.0, event="resume", details={"offset": 20}, start_offset=70),
        Line(3, 0.0, {"loss": 30.0}, start_offset=80),
    ]
    assert [line.metrics["loss"] for line in journal.effective(lines)] == [1.0, 2.0, 30.0]


def test_a_missing_journal_has_no_lines(path):
    assert journal.series(path) == {}


def test_a_journal_that_cannot_be_opened_is_told_in_one_line(path):
    path.mkdir()
    with pytest.raises(RunError, match="cannot open the journal") as raised:
        Journal(path)
    assert "\n" not in str(raised.value)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from trackopt.journal import Journal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails as on a full disk
journal = Journal(Path(sys.argv[1]))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in range(1, 101):
    if step == 40:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.offset + 30, hard))
    if step == 80:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.record(step, {"loss": step})
journal.close()
"""


@pytest.mark.integration
def test_a_full_disk_loses_no_line(path, tmp_path):
    """While the disk is full the lines wait; it is told once; as soon as there is room they are written."""
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    done = run_script(script, path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trackopt:") == 1
    assert [line.step for line in journal.read(path)] == list(range(1, 101))


def test_lines_that_wait_are_counted_in_the_offset(path, monkeypatch):
    """A checkpoint taken meanwhile knows that they belong to its history."""
    writer = Journal(path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", refuse)
        writer.record(1, {"loss": 0.5})
        offset = writer.offset
    writer.mark("resume", 1, offset=offset)
    writer.close()
    assert [line.step for line in journal.effective(journal.read(path))] == [1]


def test_a_failure_at_the_close_is_told(path, monkeypatch, caplog):
    writer = Journal(path)
    real = os.close

    def close(file):
        real(file)
        refuse()

    with monkeypatch.context() as broken:
        broken.setattr(os, "close", close)
        writer.close()
    assert "may be lost (No space left on device)" in caplog.text


def refuse(*_):
    raise OSError(28, "No space left on device")
