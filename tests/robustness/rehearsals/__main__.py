"""``python -m tests.robustness.rehearsals [--only WORDS]``: rehearse every case, and print each cause."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.robustness.rehearsals.cases import CORRECT, FAULTY

if TYPE_CHECKING:
    from tests.robustness.rehearsals.cases import Case


def main() -> int:
    """Return 1 if a cause was not named or a correct training accused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    cases = [case for case in (*FAULTY, *CORRECT) if only in case.line]
    wrong = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, outcome in zip(cases, pool.map(lambda case: case.rehearse("--kills", "2"), cases), strict=True):
            right = case.is_right(outcome)
            wrong += not right
            print(f"{'ok   ' if right else 'WRONG'} {case.line:36} {_describe(case, outcome)}", flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} are right")
    return int(wrong > 0)


def _describe(case: Case, outcome: dict[str, Any]) -> str:
    if "trouble" in outcome:
        return str(outcome["trouble"])
    seconds = outcome["seconds"]
    ratio = f"{sum(seconds.values()) / seconds['uninterrupted']:.1f} x"
    kills = ", ".join(f"{kill['step']} from {kill['resumed_from']}" for kill in outcome["kills"])
    if outcome["verdict"] is None:
        return f"exact, {ratio}, killed {kills}"
    cause = outcome["verdict"]["cause"]
    return f"{cause['kind']}: {cause['seen']} ({ratio}, killed {kills})"


if __name__ == "__main__":
    sys.exit(main())
