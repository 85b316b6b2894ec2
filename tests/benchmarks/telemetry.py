"""What telemetry adds to a training step: ours, with everything on and both sinks, against what people write today."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import orjson
import torch
from torch import nn
from torch._utils import _flatten_dense_tensors

import trackopt
from tests.benchmarks.measure import Row, table, without_hooks
from trackopt.recorder.cursor import Cursor, CursorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    Log = Callable[[int, Tensor], object]
    Without = Callable[[], AbstractContextManager[None]]
    Way = Callable[[Optimizer, LRScheduler, str], AbstractContextManager[tuple[Log, Without]]]

_TIMES = 11  # alternations of steps with and without
_FIRST = 5  # steps with a way of logging that do not count
_STEPS = {"mlp": 300, "cnn": 40, "transformer": 8}  # between two turns


def build(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and the one batch that it is trained on."""
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)), torch.randn(64, 2), _labels(64, 2)
    if kind == "cnn":
        blocks = [
            layer
            for inner, outer in ((1, 16), (16, 32))
            for layer in (nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        head = [nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*blocks, *head), torch.randn(64, 1, 28, 28), _labels(64, 10)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), 6)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(32 * 256, 10)), torch.randn(8, 32, 256), _labels(8, 10)


def _labels(count: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (count,))


def train(kind: str, way: Way) -> tuple[float, float]:
    """Milliseconds of a bare step, and those that a way of logging adds to one.

    Steps with it and without it take turns within one training: its memory lies where it lies, and what else the
    machine does hits both.
    """
    model, x, y = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.99)
    criterion = nn.CrossEntropyLoss()
    counter = count()

    def milliseconds(log: Log, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            log(next(counter), loss)
            scheduler.step()
        return (time.perf_counter() - begin) / steps * 1000

    def bare(step: int, loss: Tensor) -> None:
        pass

    steps = _STEPS[kind]
    milliseconds(bare, steps)
    with tempfile.TemporaryDirectory() as folder, way(optimizer, scheduler, folder) as (log, without):
        milliseconds(log, _FIRST)
        times = []
        for _ in range(_TIMES):
            with without():
                before = milliseconds(bare, steps)
            times.append((before, milliseconds(log, steps)))
    return statistics.median(one for one, _ in times), statistics.median(other - one for one, other in times)


def _first_moments(optimizer: Optimizer) -> list[Tensor]:
    return [state["exp_avg"] for state in optimizer.state.values()]


def _measured(optimizer: Optimizer, loss: Tensor) -> dict[str, float]:
    """What a script of today logs: three numbers."""
    norm = torch.stack(torch._foreach_norm(_first_moments(optimizer))).norm()
    return {"loss": loss.item(), "lr": optimizer.param_groups[0]["lr"], "exp_avg": norm.item()}


@contextmanager
def one_pass(optimizer: Optimizer, scheduler: LRScheduler, folder: str) -> Iterator[tuple[Log, Without]]:
    """The least that it takes to read what ours reads."""

    def log(step: int, loss: Tensor) -> None:
        parameters = optimizer.param_groups[0]["params"]
        states = [[state[name] for state in optimizer.state.values()] for name in ("exp_avg", "exp_avg_sq")]
        with torch.no_grad():
            for tensors in (parameters, [p.grad for p in parameters], *states):
                torch._foreach_norm(tensors)

    yield log, nullcontext


@contextmanager
def summary_writer(optimizer: Optimizer, scheduler: LRScheduler, folder: str) -> Iterator[tuple[Log, Without]]:
    from torch.utils.tensorboard import SummaryWriter

    def log(step: int, loss: Tensor) -> None:
        for name, value in _measured(optimizer, loss).items():
            writer.add_scalar(name, value, step)

    with SummaryWriter(folder) as writer:
        yield log, nullcontext


@contextmanager
def synchronous_mlflow(optimizer: Optimizer, scheduler: LRScheduler, folder: str) -> Iterator[tuple[Log, Without]]:
    import mlflow

    with mlflow.start_run():
        yield (
            lambda step, loss: mlflow.log_metrics(_measured(optimizer, loss), step=step, synchronous=True),
            nullcontext,
        )


@contextmanager
def shortest_path(optimizer: Optimizer, scheduler: LRScheduler, folder: str) -> Iterator[tuple[Log, Without]]:
    """The numbers that ours records, by the least code that is right for float32 on the CPU: one gather, one line."""
    (group,) = optimizer.param_groups
    parameters, rates = group["params"], []
    size = sum(parameter.numel() for parameter in parameters)
    starts = np.arange(4) * size
    file = os.open(f"{folder}/lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before(*_: object) -> None:
        rates.append(group["lr"])

    def measure() -> dict[str, float]:
        states = [optimizer.state[parameter] for parameter in parameters]
        tensors = [parameter.grad for parameter in parameters] + [parameter.data for parameter in parameters]
        tensors += [state["exp_avg"] for state in states] + [state["exp_avg_sq"] for state in states]
        values = _flatten_dense_tensors(tensors).numpy().astype(np.float64)
        sums, squares = (np.add.reduceat(each, starts).tolist() for each in (values, values * values))
        lows, highs = np.minimum.reduceat(values, starts).tolist(), np.maximum.reduceat(values, starts).tolist()
        metrics = {"lr": rates.pop()}
        for index, name in enumerate(("grad", "param", "exp_avg", "exp_avg_sq")):
            metrics[f"{name}.norm"], mean = squares[index] ** 0.5, sums[index] / size
            if index > 1:
                metrics[f"{name}.mean"], metrics[f"{name}.min"], metrics[f"{name}.max"] = (
                    mean,
                    lows[index],
                    highs[index],
                )
                metrics[f"{name}.std"] = max(squares[index] / size - mean * mean, 0) ** 0.5
        return metrics

    def log(step: int, loss: Tensor) -> None:
        line = {"step": step, "time": time.time(), "metrics": latest.pop() | {"loss": loss.item()}}
        os.write(file, orjson.dumps(line) + b"\n")

    latest: list[dict[str, float]] = []
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: latest.append(measure()))
    yield log, lambda: without_hooks(optimizer)
    os.close(file)


def without_statistics(
    optimizer: Optimizer, scheduler: LRScheduler, folder: str
) -> AbstractContextManager[tuple[Log, Without]]:
    return ours(optimizer, scheduler, folder, stats=None)


@contextmanager
def ours(
    optimizer: Optimizer, scheduler: LRScheduler, folder: str, stats: str | None = "group"
) -> Iterator[tuple[Log, Without]]:
    with trackopt.wrap(optimizer, scheduler, dir=f"{folder}/run", stats=stats) as run:
        recorder = run._loop.attempt._recorder._process

        def log(step: int, loss: Tensor) -> None:
            run.step(loss=loss)
            if run.global_step == _FIRST:
                # The recorder starts once in a training; its steps are what is measured.
                while not CursorFile(run.dir).load("tensorboard", Cursor).offset:
                    time.sleep(0.1)

        @contextmanager
        def without() -> Iterator[None]:
            """No hooks, and no recorder that would work then."""
            recorder.send_signal(signal.SIGSTOP)
            with without_hooks(optimizer):
                yield
            recorder.send_signal(signal.SIGCONT)

        yield log, without
        recorder.kill()  # what it would still deliver is not measured, and must not disturb what is


def main() -> bool:
    """Print the table; whether every limit is kept."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        rows = [row for kind in _STEPS for row in _rows(kind)]
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return table(f"telemetry: medians of {_TIMES} alternations, milliseconds for each step, {load}", rows)


def _rows(kind: str) -> list[Row]:
    ways = one_pass, summary_writer, synchronous_mlflow, ours
    (_, least), (_, writer), (_, mlflow), (step, own) = (train(kind, way) for way in ways)
    figures = f"bare {step:.2f}, ours {own:+.3f}"
    if kind == "mlp":
        (_, shortest), (_, bare) = (train(kind, way) for way in (shortest_path, without_statistics))
        return [
            Row(
                f"{kind}: added, against the shortest path", f"{figures}, shortest {shortest:+.3f}", own / shortest, 1.4
            ),
            Row(f"{kind}: added without statistics, ms", f"SummaryWriter {writer:+.3f}", bare, 0.03),
            Row(f"{kind}: added, against SummaryWriter", f"{figures}, SummaryWriter {writer:+.3f}", own / writer, 0.3),
            Row(f"{kind}: added, against synchronous MLflow", f"{figures}, MLflow {mlflow:+.3f}", own / mlflow, 0.03),
        ]
    figures = f"{figures}, one pass {least:+.2f}, writer {writer:+.2f}, MLflow {mlflow:+.2f}"
    return [
        Row(f"{kind}: added, against one pass over its state", figures, own / least, 1.25),
        Row(f"{kind}: against bare", figures, (step + own) / step, 1.02),
    ]


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
