"""Try everything and print what came of it; ends with 1 if anything was lost, or could not be resumed."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields

from tests.robustness.faults.report import Budget, lines, prove


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.faults", description=__doc__)
    for each in fields(Budget):
        parser.add_argument(f"--{each.name}", type=str if each.name == "only" else int, default=each.default)
    budget = Budget(**vars(parser.parse_args()))
    begin = time.monotonic()
    tally, left = prove(budget, tell=lambda text: _say(f"  … {text}, {time.monotonic() - begin:.0f} s"))
    _say(f"fault injection, seed {budget.seed}, in {time.monotonic() - begin:.0f} s")
    for line in lines(tally):
        _say(line)
    for name, finding in tally.findings[:20]:
        again = f"python -m tests.robustness.faults --seed {budget.seed} --only {name}"
        _say(f"\n{finding.kind}: {finding.text}\n  again: {again}")
    if tally.findings:
        _say(f"\nwhat they left: {left}")
    return 1 if tally.findings else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
