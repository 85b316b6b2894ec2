"""The short form of ``make faults``: a sample of each kind of harm, each resumed from and compared."""

from __future__ import annotations

import pytest

from tests.robustness.faults.forks import missing_tools
from tests.robustness.faults.report import STRACE, WITHOUT, Budget, lines, prove

pytestmark = pytest.mark.timeout(900)  # many trainings, some of them under strace
SAMPLE = Budget(seed=7, kills=20, flips=1, states=1, most=12, workers=1)


def proven(kinds, record_property):
    tally, _ = prove(SAMPLE, kinds)
    record_property("tally", "\n".join(["harm, each time resumed from:", *lines(tally)]))
    assert tally.findings == []
    return tally.count


def test_nothing_is_lost_by_kills_short_writes_and_flips(record_property):
    """Killed at random moments, with writes that write less, with a byte changed: resumed to the same last bit."""
    count = proven(WITHOUT, record_property)
    assert count["random kills"] == SAMPLE.kills
    assert count["short writes"] == SAMPLE.most
    assert count["flips in a checkpoint"] + count["flips in the journal"] == SAMPLE.most


@pytest.mark.skipif(bool(missing_tools()), reason=f"on this machine {missing_tools()}")
def test_nothing_is_lost_at_system_calls_and_in_crashes(record_property):
    """Killed before a system call, refused by one, cut off by a crash of the machine: resumed to the same last bit."""
    count = proven(STRACE, record_property)
    assert count["system calls swept"] > SAMPLE.most // 2
    assert count["faults injected"] == count["crash states"] == SAMPLE.most
