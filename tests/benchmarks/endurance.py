"""A run of a hundred thousand steps: every one arrives exactly once, in memory that does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.measure import Row, table
from tests.helpers.stores import mlflow_points, tensorboard_points
from trackopt import journal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STEPS = 100_000
_SCRIPT = f"""
import sys, torch, trackopt
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1])
x = torch.randn(8, 2)
for _ in range({_STEPS}):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    run.step(loss=loss)
run.close()
"""


def main() -> bool:
    """Print the table; whether nothing is missing and nothing grew."""
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        directory = Path(folder) / "run"
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        begin = time.perf_counter()
        trainer, recorder = _watch(subprocess.Popen([sys.executable, "-c", _SCRIPT, str(directory)]), directory)
        seconds = time.perf_counter() - begin
        expected = journal.series(directory)
        rows = [
            _complete("journal", expected, expected),
            _complete("event file", tensorboard_points(directory), expected),
            _complete("MLflow", mlflow_points(directory), expected),
            _growth("trainer", trainer),
            _growth("recorder", recorder),
        ]
    return table(f"endurance: {_STEPS:,} steps, {len(expected)} series, delivered after {seconds:.0f} s", rows)


def _watch(process: subprocess.Popen[bytes], directory: Path) -> tuple[list[float], list[float]]:
    """Resident memory, in MiB, of a training and of its recorder, each second while steps are taken or delivered."""
    trainer: list[float] = []
    recorder: list[float] = []
    while process.poll() is None:
        time.sleep(1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not (directory / journal.NAME).exists() or not (found := _text(children).split()):
            continue
        trainer.append(_resident(process.pid))
        recorder.append(_resident(int(found[0])))
    if process.returncode:
        raise RuntimeError(f"the training ended with {process.returncode}")
    return trainer, [mib for mib in recorder if mib]


def _resident(process: int) -> float:
    pages = _text(Path(f"/proc/{process}/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages else 0.0


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the process is gone
        return ""


def _complete(where: str, found: Mapping[str, Sequence[tuple[int, float]]], expected: Mapping[str, object]) -> Row:
    """How many points are missing or double."""
    wrong = sum(len(_due(key)) for key in expected if key not in found)
    for key, series in found.items():
        steps = [step for step, _ in series]
        wrong += len({*_due(key)} ^ set(steps)) + len(steps) - len(set(steps))
    return Row(f"{where}: points missing or double", f"of {sum(len(_due(key)) for key in expected):,}", wrong, 0)


def _due(key: str) -> range:
    """The steps at which there is a point."""
    return range(1, _STEPS + 1, 10 if key.startswith("update/") or key.endswith(".cosine") else 1)


def _growth(who: str, mib: Sequence[float]) -> Row:
    """From the first quarter of the time, when everything is imported, to the end."""
    early, late = mib[len(mib) // 4], mib[-1]
    return Row(f"{who}: growth, MiB", f"{early:.0f} → {late:.0f} MiB, at most {max(mib):.0f}", late - early, 16)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
