"""What trackopt adds to a step of DDP and of FSDP2: two processes over gloo, with everything on, and without it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import trackopt
from tests.benchmarks.measure import Row, table
from tests.benchmarks.telemetry import build

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMES = 5
_STEPS = {"mlp": 500, "cnn": 150}
_FIRST = 20  # steps that do not count
_LIMITS = {("DDP", "mlp"): 2.0, ("DDP", "cnn"): 1.1, ("FSDP2", "mlp"): 2.0, ("FSDP2", "cnn"): 1.1}


def main() -> bool:
    """Print the table; whether every limit is kept."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        done = subprocess.run(
            [*torchrun, "--module", "tests.benchmarks.several", folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    rows = [_row(*line.split()) for line in done.stdout.splitlines()]
    return table(f"DDP and FSDP2: medians of {_TIMES} alternations, milliseconds for each step, two processes", rows)


def _row(way: str, kind: str, bare: str, ours: str, ratio: str) -> Row:
    figures = f"bare {float(bare):.2f}, ours {float(ours):.2f}"
    return Row(f"{kind}: against {way} alone", figures, float(ratio), _LIMITS[way, kind])


def rank(folder: str) -> None:
    """One of the processes; the first prints a line for each model."""
    torch.distributed.init_process_group("gloo")
    for way, kind in _LIMITS:
        pairs = [(_train(way, kind, None), _train(way, kind, f"{folder}/{way}{kind}{n}")) for n in range(_TIMES)]
        bare, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        if torch.distributed.get_rank() == 0:
            print(way, kind, bare, ours, statistics.median(b / a for a, b in pairs), flush=True)
    torch.distributed.destroy_process_group()


def _train(way: str, kind: str, directory: str | None) -> float:
    """Milliseconds for each step; with a directory, as a run there."""
    model, x, y = build(kind)
    if way == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    run = directory and trackopt.wrap(optimizer, model=model, dir=directory, progress_bar=False)

    def loop(steps: int, log: Callable[..., object]) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            log(loss=loss)

    log = run.step if run else lambda loss: None
    loop(_FIRST, log)
    begin = time.perf_counter()
    loop(_STEPS[kind], log)
    taken = (time.perf_counter() - begin) / _STEPS[kind] * 1000
    if run:
        run.close(wait=False)
    return taken


if __name__ == "__main__":
    rank(sys.argv[1])
