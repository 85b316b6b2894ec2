"""Examine packages and print a table; ends with 1 if a package is below its recorded numbers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tests.robustness.optimizers.catalog import PACKAGES
from tests.robustness.optimizers.runner import Result, run

if TYPE_CHECKING:
    from tests.robustness.optimizers.check import Outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.optimizers", description=__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"default: all of {', '.join(PACKAGES)}")
    parser.add_argument("--only", action="append", default=[], help="classes whose name contains this; repeatable")
    parser.add_argument("--every", type=int, default=1, help="take every n-th class")
    parser.add_argument("--workers", type=int, default=2, help="packages at the same time")
    parser.add_argument("--json", type=Path, help="write each outcome to this file")
    options = parser.parse_args()
    if unknown := set(options.packages) - PACKAGES.keys():
        parser.error(f"unknown package: {', '.join(sorted(unknown))}")
    begin, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 160)

    def report(package: str, outcome: Outcome) -> None:
        for line in outcome.errors if outcome.is_fault or not outcome.runnable else ():
            console.print(f"{package} {outcome.name}: {line}", markup=False, highlight=False, soft_wrap=True)

    arguments = ["--every", str(options.every), *(f"--only={part}" for part in options.only)]
    results = list(run(options.packages or list(PACKAGES), arguments, options.workers, report))
    console.print(table(results))
    console.print(f"in {time.monotonic() - begin:.0f} s")
    if options.json:
        contents = {result.package: [asdict(outcome) for outcome in result.outcomes] for result in results}
        options.json.write_text(json.dumps(contents, indent=1))
    partial = options.only or options.every > 1
    regressions = [] if partial else [line for result in results for line in result.regressions()]
    for line in regressions:
        console.print(line, markup=False, highlight=False)
    return 1 if regressions else 0


def table(results: list[Result]) -> Table:
    """Return the numbers of each package and their sums."""
    columns = {
        "classes": lambda outcome: True,
        "runnable": lambda outcome: outcome.runnable,
        "equal under wrap": lambda outcome: outcome.equal,
        "resumed exactly": lambda outcome: outcome.resumed,
        "own fault": lambda outcome: outcome.has_own_fault,
        "announced": lambda outcome: outcome.has_own_fault and bool(outcome.announced),
        "to fix": lambda outcome: outcome.is_fault,
        "kills": lambda outcome: outcome.kills,
        "statistics": lambda outcome: outcome.statistics,
    }
    drawn = Table("package", title="Optimizers and schedulers", title_justify="left")
    for column in columns:
        drawn.add_column(column, justify="right")
    counts = [[result.count(holds) for holds in columns.values()] for result in results]
    for result, numbers in zip(results, counts, strict=True):
        drawn.add_row(result.package, *(f"{number:,}" for number in numbers))
    drawn.add_section()
    drawn.add_row("all", *(f"{sum(numbers):,}" for numbers in zip(*counts, strict=True)))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
