"""Run the fuzzer on all cores and print what came of it; ends with 1 if any input was more than refused."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests.robustness.fuzz.check import Tally, made, place, run
from tests.robustness.fuzz.corpus import corpus

_PART = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that failed")
    options = parser.parse_args()
    files, begin, total = corpus(), time.monotonic(), Tally()
    parts = [range(start, min(start + _PART, options.count)) for start in range(0, options.count, _PART)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run, files, options.seed, part): part for part in parts}
        for done in as_completed(waiting):
            try:
                total.add(done.result())
            except BrokenProcessPool:
                total.failures.append((waiting[done].start, "the process died, in this input or one of the next"))
    _print(total, len(files), options.seed, time.monotonic() - begin)
    for number, _ in total.failures if options.keep else ():
        name, _, content = made(files, options.seed, number)
        place(options.keep / f"{number}-{name}", content)
    return 1 if total.failures else 0


def _print(total: Tally, files: int, seed: int, seconds: float) -> None:
    count = sum(total.count.values())
    sys.stdout.write(f"{count:,} inputs made of {files} files and directories, seed {seed}, in {seconds:.0f} s\n")
    for outcome, number in total.count.most_common():
        sys.stdout.write(f"  {outcome:<16} {number:>9,}   {100 * number / max(count, 1):5.1f} %\n")
    sys.stdout.write(f"  memory at most {total.kib >> 10} MiB above the start of a process\n")
    for number, failure in total.failures[:20]:
        sys.stdout.write(f"\ninput {number}:\n{failure}\n")


if __name__ == "__main__":
    sys.exit(main())
