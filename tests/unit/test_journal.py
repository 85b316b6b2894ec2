import math
import os
import zlib

import pytest

from tests.helpers.processes import run_script
from trackopt import RunError, journal
from trackopt.analysis.verify import check_journal
from trackopt.integrations import run_choice
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


def test_a_line_carries_the_checksum_of_what_precedes_it(path):
    """Any tool can check it: zlib's CRC-32 of all bytes before the field, the last of the line."""
    writer = Journal(path)
    writer.mark("start", 0, params={"name": "é"})
    writer.record(1, {"loss": math.nan})
    writer.histograms(1, {"a": Histogram([0.0], [2], -0.5, 0.75, 1.5, 2.5, 5)})
    writer.close()
    for raw in path.read_bytes().splitlines():
        content, _, rest = raw.rpartition(b',"crc":"')
        assert rest == b'%08x"}' % zlib.crc32(content)
        assert "crc" not in journal.decode(raw + b"\n", 0).details
    assert len(list(journal.read(path))) == 3


@pytest.mark.parametrize("kind", ["record", "marker"])
def test_no_flipped_bit_is_taken_for_content(kind, path):
    """The line is skipped and counted, wherever the bit is; the lines around it are read."""
    writer = Journal(path)
    writer.record(1, {"loss": 1.0})
    begin = writer.offset
    writer.record(2, {"loss": 0.25}) if kind == "record" else writer.mark("resume", 1, offset=begin)
    end = writer.offset
    writer.record(2, {"loss": 4.0})
    writer.close()
    content = path.read_bytes()
    for position in range(begin, end):
        for bit in (0, 5):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            damaged = []
            found = [(line.step, line.metrics, line.event) for line in journal.read(path, on_damage=damaged.append)]
            rest = [(1, {"loss": 1.0}, None), (2, {"loss": 4.0}, None)]
            assert found == (rest if position < end - 1 else rest[:1])  # without its newline it is one with the next
            if changed[position] != ord("\n"):
                assert [line.start_offset for line in damaged] == [begin]
                assert kind == "record" or damaged[0].may_be_marker


def test_lines_without_a_checksum_stay_valid(path):
    """Those of earlier versions, whose last field is a text too."""
    record, marker = (
        b'{"step":1,"time":1.0,"metrics":{"loss":"NaN"}}',
        b'{"event":"close","step":1,"time":2,"error":"X"}',
    )
    path.write_bytes(b"\n".join([record, marker, b""]))
    damaged = []
    assert [line.event for line in journal.read(path, on_damage=damaged.append)] == [None, "close"]
    assert damaged == []


def test_verify_names_the_damaged_lines(path):
    """A digit of a record and a marker; what is torn is told apart."""
    writer = Journal(path)
    writer.mark("start", 0)
    writer.record(1, {"loss": 1.25})
    writer.mark("resume", 1, offset=writer.offset)
    writer.close()
    assert check_journal(path).status == "sound"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1.25", b"1.75").replace(b'"resume"', b'"resime"') + b'{"step"\n' + content[:9])
    report = check_journal(path)
    assert report.status == "damaged"
    assert report.problems == (
        "2 lines have a wrong checksum, and are skipped: line 2, line 3 (perhaps a marker)",
        "1 lines are torn or no records, and are skipped: 4",
        "the last line is torn after 9 bytes: a writer was killed there, or is still writing",
    )


def test_a_damaged_marker_is_told_by_what_reads_it(tmp_path, caplog, run_cli):
    """By the series, by plot and compare, and by the choice of a framework's run."""
    path = tmp_path / journal.NAME
    writer = Journal(path)
    writer.mark("start", 0)
    writer.record(1, {"loss": 1.0})
    offset = writer.offset
    writer.record(2, {"loss": 2.0})
    writer.mark("resume", 1, offset=offset)
    writer.record(2, {"loss": 3.0})
    writer.mark("close", 2, status="FINISHED")
    writer.close()
    path.write_bytes(path.read_bytes().replace(b'"resume"', b'"resume\x7f'))
    words = f"{path}: 1 line has a wrong checksum and is skipped; if it marked a resume"
    assert journal.series(path)["loss"] == [(1, 1.0), (2, 2.0), (2, 3.0)]
    assert words in caplog.text
    for command in ("plot", "compare"):
        assert words in run_cli(command, tmp_path).err
    caplog.clear()
    assert run_choice.history_end(path, offset, 1) == (offset, set())
    assert run_choice.history_end(path, offset, 2)[1] == {"loss"}
    assert words in caplog.text
    path.write_bytes(path.read_bytes().replace(b"FINISHED", b"FINISHEE"))
    caplog.clear()
    assert not run_choice.is_finished(tmp_path)
    assert "2 lines have a wrong checksum" in caplog.text
