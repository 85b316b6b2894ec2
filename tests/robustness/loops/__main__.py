"""``python -m tests.robustness.loops [--count N] [--seed N] [--only SHAPE]``: print the tally, and each fault."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.robustness.loops.harness import Outcome, run_all


def main() -> int:
    """Run the combinations; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=560)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()

    def show(outcome: Outcome) -> None:
        if outcome.verdict == "fault":
            print(f"FAULT {outcome.shape}: {outcome.plans}\n{outcome.details}", flush=True)

    outcomes = run_all(options.count, options.seed, options.only, show)
    tally = Counter((outcome.shape, outcome.verdict) for outcome in outcomes)
    verdicts = ("exact", "reported", "fault")
    print(f"{'shape':60}" + "".join(f"{verdict:>10}" for verdict in verdicts))
    for shape in dict.fromkeys(outcome.shape for outcome in outcomes):
        print(f"{shape:60}" + "".join(f"{tally[shape, verdict]:10}" for verdict in verdicts))
    totals = Counter(outcome.verdict for outcome in outcomes)
    print(f"{'all':60}" + "".join(f"{totals[verdict]:10}" for verdict in verdicts))
    return int(totals["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
