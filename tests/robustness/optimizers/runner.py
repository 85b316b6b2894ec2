"""Runs the packages, each in a process of its own, and counts what came of their classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.robustness.optimizers.catalog import PACKAGES
from tests.robustness.optimizers.check import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_ROOT = Path(__file__).parents[3]


@dataclass
class Result:
    """What came of one package.

    Attributes:
        package: Its name.
        outcomes: Of its classes.
        error: Why it could not be examined, or not to the end.
    """

    package: str
    outcomes: list[Outcome] = field(default_factory=list)
    error: str = ""

    def count(self, holds: Callable[[Outcome], bool]) -> int:
        """Return the number of classes for which a condition holds."""
        return sum(map(holds, self.outcomes))

    def regressions(self) -> list[str]:
        """Return what is below the recorded numbers, in words."""
        floor, found = PACKAGES[self.package].floor, [self.error] if self.error else []
        for name in ("runnable", "equal", "resumed"):
            reached, least = self.count(lambda outcome, name=name: getattr(outcome, name)), getattr(floor, name)
            if reached < least:
                found.append(f"{self.package}: {name} {reached}, which must be {least}")
        return found


def run(
    packages: Sequence[str], arguments: Iterable[str], workers: int, report: Callable[[str, Outcome], None]
) -> Iterator[Result]:
    """Examine packages, several at a time; ``report`` is called after each class."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda package: examine(package, arguments, report), packages)


def examine(
    package: str, arguments: Iterable[str] = (), report: Callable[[str, Outcome], None] = lambda *_: None
) -> Result:
    """Examine one package in a process of its own."""
    result = Result(package)
    command = [sys.executable, "-m", "tests.robustness.optimizers.worker", package, *arguments]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            for line in process.stdout:
                result.outcomes.append(Outcome(**json.loads(line)))
                report(package, result.outcomes[-1])
        errors.seek(0)
        if process.returncode:
            result.error = f"{package}: {(errors.read().strip().splitlines() or ['no output'])[-1]}"
    return result
