"""Run the subjects that are named, or all of them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

TOOLS = {"__init__", "__main__", "measure"}


def main() -> int:
    subjects = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in TOOLS)
    chosen = sys.argv[1:] or subjects
    if unknown := set(chosen) - set(subjects):
        sys.stderr.write(f"{min(unknown)}: there is no such subject; choose from {', '.join(subjects)}\n")
        return 2
    met = [import_module(f"tests.benchmarks.{name}").main() for name in chosen]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
