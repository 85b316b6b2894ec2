"""How long a process takes and how much memory it holds, and tables of what came out."""

from __future__ import annotations

import os
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch.optim import Optimizer


@dataclass(frozen=True)
class Cost:
    """What one run of a process took.

    Attributes:
        seconds: From its start to its end.
        mib: Resident memory at most.
    """

    seconds: float
    mib: float


@dataclass(frozen=True)
class Row:
    """A line of a table: what was measured against what it should reach.

    Attributes:
        what: In words.
        figures: The measured values, in words.
        ratio: The figure that counts.
        limit: What it should be.
        at_most: Whether the limit is an upper one.
    """

    what: str
    figures: str
    ratio: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the limit is kept."""
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit


@contextmanager
def without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer step without its hooks."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    yield
    for each, own in zip(hooks, kept, strict=True):
        each.update(own)


def process(command: Sequence[str]) -> Cost:
    """Run a command, its output thrown away; its peak is the kernel's own count."""
    nothing = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, nothing, stream) for stream in (0, 1)]
    begin = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - begin
    os.close(nothing)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return Cost(seconds, usage.ru_maxrss / 1024)


def pairwise(ours: Callable[[], Cost], theirs: Callable[[], Cost], times: int) -> tuple[Cost, Cost, float]:
    """Both in turns, so that a busy moment hits both; the medians, and the median of the ratios in time."""
    pairs = [(ours(), theirs()) for _ in range(times)]
    ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
    a, b = (Cost(statistics.median(one.seconds for one in side), max(one.mib for one in side))
            for side in zip(*pairs, strict=True))  # fmt: skip
    return a, b, ratio


def uncached(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that the next reader has to go to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(title: str, rows: Sequence[Row]) -> bool:
    """Print a table; whether all limits are kept."""
    sys.stdout.write(f"\n{title}\n")
    for row in rows:
        sign = "≤" if row.at_most else "≥"
        verdict = "met" if row.met else "NOT MET"
        sys.stdout.write(f"  {row.what:<44} {row.figures:<50} {row.ratio:8.3f} {sign} {row.limit:<5g} {verdict}\n")
    sys.stdout.flush()
    return all(row.met for row in rows)
