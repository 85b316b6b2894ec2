"""What reading any file of less than 16 MB takes, seen from outside of the reader's process."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

BYTES = 15_900_000
SECONDS = 10  # twice what may be taken: other processes slow this one down
KIB = 256 << 10
PROGRAM = """
import sys
from trackopt.analysis.verify import verify
(report,) = verify(sys.argv[1])
print(report.status, *report.problems)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def verified(path: Path) -> tuple[str, int]:
    """Return what `verify` says in a process with a limit on its time, and the KiB that it took at most."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
    )
    said, kib = done.stdout.splitlines()
    return said, int(kib)


@pytest.mark.parametrize(
    ("head", "unit", "tail"),
    [
        (b")", b"\x85", b"."),  # tuples in tuples
        (b"(", b"M\1\2", b"t."),  # one tuple of numbers
        (b"]", b"K\1K\2\x86a", b"."),  # pairs
        (b"}", b"N\x85Ns", b"."),  # keys that are tuples
    ],
    ids=["nested tuples", "numbers", "pairs", "keys"],
)
def test_a_hostile_pickle_ends_soon_and_takes_little(head: bytes, unit: bytes, tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.pkl"
    path.write_bytes(b"\x80\x02" + head + unit * ((BYTES - 10) // len(unit)) + tail)
    said, kib = verified(path)
    assert said.startswith("not checked not checked: its pickle is larger than the reader's limits")
    assert kib < KIB


def test_keys_of_one_hash_end_soon(tmp_path: Path) -> None:
    keys = b"".join(b"\x8a\x0b" + ((2**61 - 1) * k).to_bytes(11, "little") + b"N" for k in range(1, 200_000))
    (tmp_path / "t.pkl").write_bytes(b"\x80\x02}(" + keys + b"u.")
    said, kib = verified(tmp_path / "t.pkl")
    assert "operations" in said
    assert kib < KIB


def test_three_million_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"model": {"a.weight": torch.ones(2)}, "order": torch.randperm(3_100_000).tolist()}, path)
    assert path.stat().st_size < 16_000_000
    said, kib = verified(path)
    assert said == "sound"
    assert kib < KIB
