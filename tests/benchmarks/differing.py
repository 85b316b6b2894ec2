"""Comparing two checkpoints of 1 GB: against a torch script that prints where they differ and by how much."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import Row, pairwise, process, table

_TIMES = 5
_SCRIPT = """
import sys, torch
def walk(a, b, path=""):
    if isinstance(a, dict):
        for key in a:
            walk(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            print(path, (a - b).abs().max().item(), torch.linalg.vector_norm(a - b).item())
    elif a != b:
        print(path, a, b)
walk(*(torch.load(path, weights_only=True, mmap=True, map_location="cpu") for path in sys.argv[1:]))
"""
#: Of what `reading` builds: another file whose vectors differ, and one all of whose tensors do.
_BUILD = """
import pathlib, sys, torch
from tests.benchmarks import reading
one, few, all_of_it = map(pathlib.Path, sys.argv[1:])
reading.build(one)
tree = torch.load(one, weights_only=True)
for value in tree["model"].values():
    if value.ndim == 1:
        value[0] += 1e-3
torch.save(tree, few)
for value in tree["model"].values():
    value *= 1.001
for entry in tree["optimizer"]["state"].values():
    for value in entry.values():
        value += 1e-3
torch.save(tree, all_of_it)
"""


def main() -> bool:
    """Print the table; whether every target is reached."""
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        one, few, everything, copy = (Path(folder) / f"{name}.pt" for name in ("one", "few", "all", "copy"))
        # In a process of its own: what this one holds would count as the peak of those that it starts.
        process([sys.executable, "-c", _BUILD, str(one), str(few), str(everything)])
        rows = [*_rows("few differ", one, few, 0.6), *_rows("all differ", one, everything, 0.8)]
        everything.unlink()
        shutil.copyfile(one, copy)
        rows += [*_rows("identical", one, copy, 0.6), *_rows("identical, --fast", one, copy, 0.2, "--fast")]
    return table("differing: against a torch script that loads two files of 1 GB and compares them", rows)


def _rows(name: str, one: Path, other: Path, limit: float, *options: str) -> list[Row]:
    look = ["/bin/sh", "-c", '"$@" || test $? -eq 1', "sh", sys.executable, "-m", "trackopt", "diff"]  # 1: they differ
    look += [str(one), str(other), *options]
    script = [sys.executable, "-c", _SCRIPT, str(one), str(other)]
    ours, theirs, ratio = pairwise(lambda: process(look), lambda: process(script), _TIMES)
    figures = f"{ours.seconds:.3f} s against {theirs.seconds:.3f} s"
    return [
        Row(f"diff, {name}: time", figures, ratio, limit),
        Row(f"diff, {name}: MiB at most", f"torch: {theirs.mib:.0f} MiB", ours.mib, 256),
    ]


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
