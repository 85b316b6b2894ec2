"""The short form of ``make fuzz``: some thousand inputs, each answered or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.robustness.fuzz.check import made, run
from tests.robustness.fuzz.corpus import corpus

if TYPE_CHECKING:
    from tests.robustness.fuzz.mutate import Content

COUNT = 1500
SEED = 7


def test_every_mutated_file_is_answered_or_refused() -> None:
    tally = run(corpus(), SEED, range(COUNT))
    assert not tally.failures, tally.failures[0][1]
    assert sum(tally.count.values()) == COUNT
    assert min(tally.count[outcome] for outcome in ("sound", "problems told", "refused")) > COUNT // 50
    assert tally.kib < 256 << 10


def test_an_input_is_known_by_its_number() -> None:
    files: list[tuple[str, Content]] = [("a.pt", bytes(range(200))), ("b", {"model.bin": b"PK\3\4"})]
    assert made(files, SEED, 5) == made(files, SEED, 5)
