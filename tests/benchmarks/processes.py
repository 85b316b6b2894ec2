"""How long whole processes take: 1,000 small steps, a close beside a busy process, and a sweep on two cores."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import trackopt
from tests.benchmarks.measure import Row, table

_TIMES = 3
_SWEEP = 8  # processes
_CORES = sorted(os.sched_getaffinity(0))[:2]
_BUSY = f"import os; os.sched_setaffinity(0, [{_CORES[-1]}])\nwhile True: pass"


def main() -> bool:
    """Print the table; whether every limit is kept."""
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        rows = [*_whole(Path(folder)), _beside_busy(Path(folder)), _sweep(Path(folder))]
    return table("whole processes: seconds, and ratios of them", rows)


def _whole(folder: Path) -> list[Row]:
    """1,000 steps of the loop of ``examples/moons.py``; an existing store is one that MLflow has made before."""
    bare = [_seconds(folder, "moons", "bare") for _ in range(_TIMES)]
    fresh = [_seconds(folder / f"fresh{number}", "moons", "run") for number in range(_TIMES)]
    existing = [_seconds(folder / "fresh0", "moons", f"run{number}") for number in range(_TIMES)]
    rows = []
    for what, times, limit in (("fresh directory", fresh, 4.5), ("existing store", existing, 3.5)):
        figures = f"of it without trackopt {statistics.median(bare):.1f}"
        rows.append(Row(f"1,000 steps, {what}", figures, statistics.median(times), limit))
    return rows


def _beside_busy(folder: Path) -> Row:
    """``close`` of a run of 50 steps on one core, alone and beside a process that is always busy there."""
    pairs = []
    for number in range(_TIMES):
        alone = _printed(folder, "close", f"alone{number}")
        with subprocess.Popen([sys.executable, "-c", _BUSY]) as busy:
            pairs.append((alone, _printed(folder, "close", f"busy{number}")))
            busy.kill()
    alone, beside = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row("close() beside a busy process", f"alone {alone:.1f}, beside {beside:.1f}", beside / alone, 3.0)


def _sweep(folder: Path) -> Row:
    """Several processes of 200 steps at once, with the sinks and without: the training time."""
    times = []
    for sinks in ("none", "all"):
        begin = time.perf_counter()
        processes = [_start(folder, "sweep", f"sweep-{sinks}{number}", sinks) for number in range(_SWEEP)]
        if any(process.wait() for process in processes):
            raise RuntimeError("a process of the sweep has failed")
        times.append(time.perf_counter() - begin)
    training, total = times
    figures = f"training {training:.1f}, with delivery {total:.1f}"
    return Row(f"sweep of {_SWEEP}, of 1.5 × its training + 10 s", figures, total / (1.5 * training + 10), 1.0)


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    home = str(Path(__file__).parents[2])
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.processes", *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": home},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _seconds(folder: Path, *arguments: str) -> float:
    begin = time.perf_counter()
    _printed(folder, *arguments)
    return time.perf_counter() - begin


def _printed(folder: Path, *arguments: str) -> float:
    """Run a training; return the number that it prints."""
    process = _start(folder, *arguments)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    return float(output)


def train(kind: str, directory: str, sinks: str = "all") -> float:
    """Train as one of the processes; return the seconds of the close."""
    if kind != "moons":
        os.sched_setaffinity(0, _CORES[-1:] if kind == "close" else _CORES)
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    y = (x.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2), nn.LogSoftmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.99)

    def step(rows: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    epochs = {"moons": 100, "close": 5, "sweep": 20}[kind]  # of 10 steps
    if directory == "bare":
        for _ in range(epochs):
            for rows in torch.randperm(400).split(40):
                step(rows)
        return 0.0
    chosen = ("tensorboard", "mlflow") if sinks == "all" else ()
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=100, sinks=chosen)
    for _ in run.epochs(epochs):
        for rows in run.batches(torch.randperm(400).split(40)):
            run.log(loss=step(rows))
        run.log(accuracy=(model(x).argmax(dim=1) == y).float().mean())
    begin = time.perf_counter()
    run.close()
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(train(*sys.argv[1:]))
