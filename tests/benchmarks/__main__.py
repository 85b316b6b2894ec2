"""Run the subjects that are named, or all of them."""

from __future__ import annotations

import subprocess
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
    if len(chosen) == 1:
        return 0 if import_module(f"tests.benchmarks.{chosen[0]}").main() else 1
    # Each in a process of its own: the memory of a child is at least that of its parent.
    codes = [
        subprocess.run([sys.executable, "-m", "tests.benchmarks", name], check=False).returncode for name in chosen
    ]
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
