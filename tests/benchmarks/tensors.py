"""What the statistics of large and of many tensors cost, against one pass over them by ``torch._foreach_norm``."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

import trackopt
from tests.benchmarks.measure import Row, table, without_hooks
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.options import StatsOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_TIMES = 21  # alternations
_BUFFERS = "exp_avg", "exp_avg_sq"
_UPDATE_EVERY = 10


def main() -> bool:
    """Print the table; whether every limit is kept."""
    logging.disable(logging.WARNING)
    rows = [_buffers(64, 1 << 20, 1.25), _buffers(200, 1 << 12, 1.5)]
    rows += [_step(count, size) for count, size in ((300, 1024), (1000, 4096), (3000, 1024))]
    rows += [_series("group", 1.1), _series("param", 1.5), _update()]
    threads = torch.get_num_threads()
    return table(f"tensors: medians of {_TIMES} alternations, {threads} threads, load {os.getloadavg()[0]:.1f}", rows)


def build(count: int, size: int) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Parameters with gradients, and their AdamW after a step."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size)) for _ in range(count)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn(size)
    optimizer.step()
    return parameters, optimizer


def _milliseconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1000


def _in_turns(*works: Callable[[], object]) -> list[list[float]]:
    """Return the times of each, taken in turns."""
    rounds = [[_milliseconds(work) for work in works] for _ in range(_TIMES + 1)]
    return [list(times) for times in zip(*rounds[1:], strict=True)]


@torch.no_grad()
def _one_pass(lists: Sequence[Sequence[Tensor]]) -> None:
    for tensors in lists:
        torch._foreach_norm(tensors)


def _buffers(count: int, size: int, limit: float) -> Row:
    """The statistics of AdamW's two buffers alone."""
    parameters, optimizer = build(count, size)
    states = [[optimizer.state[parameter][name] for parameter in parameters] for name in _BUFFERS]
    for parameter in parameters:
        parameter.grad = None
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)
    empty, plan = {}, observer._optimizer_metrics

    def ours() -> None:
        plan.compute(empty)

    ours()
    norms = [[parameter] for parameter in parameters]

    def least() -> None:
        _one_pass(states)

    def parameters_too() -> None:
        _one_pass(norms)

    ours_ms, least_ms, other_ms = _in_turns(ours, least, parameters_too)
    own = statistics.median(a - c for a, c in zip(ours_ms, other_ms, strict=True))  # ours reads the parameters as well
    one = statistics.median(least_ms)
    return Row(f"buffers of {count} x {size * 4 // 1024} KB", f"{own:.2f} ms against {one:.2f} ms", own / one, limit)


def _step(count: int, size: int) -> Row:
    """What a step of AdamW alone takes longer."""
    parameters, optimizer = build(count, size)
    with tempfile.TemporaryDirectory() as folder, trackopt.wrap(optimizer, dir=folder, sinks=()) as run:

        def ours() -> None:
            optimizer.step()
            run.step()

        def bare() -> None:
            with without_hooks(optimizer):
                optimizer.step()

        def least() -> None:
            states = [[state[name] for state in optimizer.state.values()] for name in _BUFFERS]
            _one_pass([parameters, [parameter.grad for parameter in parameters], *states])

        for _ in range(3):
            ours()
        ours_ms, bare_ms, least_ms = _in_turns(ours, bare, least)
    own = statistics.median(a - b for a, b in zip(ours_ms, bare_ms, strict=True))
    one, step = statistics.median(least_ms), statistics.median(bare_ms)
    figures = f"step {step:.1f}, added {own:.2f}, one pass {one:.2f} ms"
    return Row(f"AdamW over {count:,} x {size:,}: added", figures, own / one, 1.4)


def _series(stats: str, limit: float) -> Row:
    """A step of a perceptron whose 320 parameters are in 40 groups."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(160) for layer in (nn.Linear(16, 16), nn.Tanh())))
    parameters = [*model.parameters()]
    groups = [{"params": parameters[start : start + 8]} for start in range(0, 320, 8)]
    optimizer, x = torch.optim.AdamW(groups), torch.randn(8, 16)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        run = trackopt.wrap(optimizer, model=model, dir=folder, sinks=(), stats=stats)

        def bare() -> None:
            with without_hooks(optimizer):
                step()

        def ours() -> None:
            step()
            run.step()

        for _ in range(3):
            ours()
        ours_ms, bare_ms = _in_turns(ours, bare)
        run.close()
    ratio = statistics.median(a / b for a, b in zip(ours_ms, bare_ms, strict=True))
    figures = f"{statistics.median(ours_ms):.2f} ms against {statistics.median(bare_ms):.2f} ms"
    return Row(f"320 parameters in 40 groups, stats={stats!r}", figures, ratio, limit)


def _update() -> Row:
    """The steps that measure the update as well, a tenth of all, against the others."""
    _, optimizer = build(64, 1 << 18)
    with tempfile.TemporaryDirectory() as folder, trackopt.wrap(optimizer, dir=folder, sinks=()) as run:
        times = []
        for _ in range(_UPDATE_EVERY * 8 + 1):
            begin = time.perf_counter()
            optimizer.step()
            run.step()
            times.append((time.perf_counter() - begin) * 1000)
    measured, others = times[_UPDATE_EVERY::_UPDATE_EVERY], [t for i, t in enumerate(times) if i % _UPDATE_EVERY]
    with_update, without = statistics.median(measured), statistics.median(others)
    figures = f"{with_update:.1f} ms against {without:.1f} ms, 64 MB of parameters"
    return Row("a step with the update, to one without", figures, with_update / without, 2.0)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
