"""What a save costs: the loop's stall, the time to the disk, a verified restore, and training beside it.

0.8 GB of state, weights and AdamW's moments. Everything is set against a plain way to do the least of it, in turns.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import trackopt
from tests.benchmarks.measure import Cost, Row, pairwise, table
from trackopt.checkpoint.async_write import lower_thread_priority
from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.reader import load
from trackopt.checkpoint.retention import Retention, RetentionMarks
from trackopt.checkpoint.snapshot import capture
from trackopt.checkpoint.store import CheckpointStore
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TIMES = 7
_WINDOW = 4.0  # seconds of training, with and without writes in turns
_GB = 1e9
_SHAPES = ((150, 40_000), (1_000, 4_096), (3_000, 1_024))  # parameters and their elements
_ANY_SAVE = 3e-3  # seconds


def build(layers: int = 64, width: int = 1024) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its AdamW after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, optimizer


def main() -> bool:
    """Print the table; whether every target is reached."""
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as name:
        folder = Path(name)
        met = table("saving: 0.8 GB of state", [*_saves(folder), *_beside(folder)])
        many = [row for count, size in _SHAPES for row in _many(folder / str(count), count, size)]
        big = _resumed(folder / "big", build, "64 x 4 MB", 1.3)
        return table("saving: many tensors", [*many, *big]) and met


def _build_many(count: int, size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.ParameterList([nn.Parameter(torch.randn(size)) for _ in range(count)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, torch.optim.AdamW(model.parameters())


def _many(folder: Path, count: int, size: int) -> list[Row]:
    """The stall of a save, less what any save may take, to one `_foreach_copy_` of the same; and the resume."""
    name = f"{count:,} x {size:,}"
    model, optimizer = _build_many(count, size)
    run = trackopt.wrap(optimizer, model=model, dir=folder, sinks=(), stats=None, keep=1, progress_bar=False)
    optimizer.step()
    run.step()
    run.save(wait=True)
    sources = [value for state in optimizer.state.values() for value in state.values()]
    sources += [parameter.detach() for parameter in model.parameters()]
    targets = [torch.zeros_like(source) for source in sources]

    def stall() -> Cost:
        optimizer.step()  # the caches are the training's
        run.step()
        cost = _timed(run.save)
        run.save(wait=True)
        return Cost(max(cost.seconds - _ANY_SAVE, 0), 0)

    def copied() -> Cost:
        optimizer.step()
        return _timed(lambda: torch._foreach_copy_(targets, sources))

    stalls = pairwise(stall, copied, _TIMES)
    run.close()
    return [
        _row(f"stall less 3 ms, {name}, to a copy", stalls, 1.3),
        *_resumed(folder, lambda: _build_many(count, size), name, 1.0),
    ]


def _resumed(
    folder: Path, make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], name: str, limit: float
) -> list[Row]:
    """``wrap`` with a resume, and ``restore``, to torch.load of the same file."""
    if not folder.exists():
        model, optimizer = make()
        with trackopt.wrap(optimizer, model=model, dir=folder, sinks=(), stats=None, progress_bar=False) as run:
            optimizer.step()
            run.step()
    path = next((folder / "checkpoints").glob("step-*.pt"))

    def resume() -> Cost:
        model, optimizer = make()
        runs = []
        cost = _timed(lambda: runs.append(trackopt.wrap(optimizer, model=model, dir=folder, sinks=(), stats=None,
                                                        progress_bar=False)))  # fmt: skip
        runs[0].close()
        return cost

    def restore() -> Cost:
        model, optimizer = make()
        return _timed(lambda: trackopt.restore(path, model=model, optimizer=optimizer))

    def load() -> Cost:
        return _timed(lambda: torch.load(path, weights_only=True))

    rows = [_row(f"resume in wrap, {name}, to torch.load", pairwise(resume, load, _TIMES), limit)]
    if limit > 1:
        rows.append(_row(f"restore, {name}, to torch.load", pairwise(restore, load, _TIMES), limit))
    return rows


def _saves(folder: Path) -> list[Row]:
    model, optimizer = build()
    run = trackopt.wrap(optimizer, model=model, dir=folder / "run", sinks=(), stats=None, keep=1)
    optimizer.step()
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    warm = [torch.zeros_like(tensor) for tensor in tensors]
    size = sum(tensor.nbytes for tensor in tensors)
    _copied(tensors, warm)
    run.step()
    time.sleep(5)  # the memory is being made ready, in a training that takes longer than this one
    first = _timed(run.save)
    copy = statistics.median(_copied(tensors, warm).seconds for _ in range(_TIMES))
    run.save(wait=True)

    def stall() -> Cost:
        cost = _timed(run.save)
        run.save(wait=True)  # so that the disk is quiet again
        return cost

    stalls = pairwise(stall, lambda: _copied(tensors, warm), _TIMES)
    durable = pairwise(lambda: _timed(lambda: run.save(wait=True)), lambda: _raw(warm, folder / "raw"), _TIMES)
    run.close()
    path = next((folder / "run/checkpoints").glob("step-*.pt"))
    (folder / "raw").unlink()
    restored = pairwise(
        lambda: _timed(lambda: load(path)), lambda: _timed(lambda: torch.load(path, weights_only=True)), _TIMES
    )
    return [
        Row("first save: the loop's stall", _against(first.seconds, copy), first.seconds / copy, 1.3),
        _row("later saves: the loop's stall, to a warm copy", stalls, 1.3),
        _row("on the disk, to raw write and fsync", durable, 1.0, size),
        _row("restore, verified, to torch.load", restored, 1.5, size),
    ]


def _beside(folder: Path) -> list[Row]:
    """Training at full speed while one checkpoint after the other is written, and while none is."""
    store = CheckpointStore(folder / "beside", Retention(1))
    staged = store.stage(capture(Training(*build()), RunProgress(step=1)), RetentionMarks())
    written = 0

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        stop = threading.Event()

        def write() -> None:
            nonlocal written
            lower_thread_priority()
            while not stop.is_set():
                store.commit(staged, 1, lambda: None)
                written += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def busy(step: Callable[[], None]) -> Cost:
        with writing():
            return _training(step)

    rows = []
    for name, step, limit in (("a CNN", _cnn(), 1.05), ("a transformer", _transformer(), 1.2)):
        step()
        written, begin = 0, time.perf_counter()
        ours, theirs, ratio = pairwise(lambda step=step: busy(step), lambda step=step: _training(step), 5)
        each = (time.perf_counter() - begin) / 2 / max(written, 1)
        figures = f"{_against(ours.seconds, theirs.seconds)} a step, a save every {each:.1f} s"
        rows.append(Row(f"{name}'s step beside writes", figures, ratio, limit))
    return rows


def _training(step: Callable[[], None]) -> Cost:
    """The mean step of a window."""
    times = []
    end = time.perf_counter() + _WINDOW
    while (begin := time.perf_counter()) < end:
        step()
        times.append(time.perf_counter() - begin)
    return Cost(statistics.mean(times), 0)


def _cnn() -> Callable[[], None]:
    sizes = ((1, 16), (16, 32))
    blocks = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    head = [nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)]
    return _step(nn.Sequential(*blocks, *head), torch.randn(64, 1, 28, 28))


def _transformer() -> Callable[[], None]:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    return _step(nn.TransformerEncoder(layer, 6), torch.randn(8, 32, 256))


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _timed(work: Callable[[], object]) -> Cost:
    begin = time.perf_counter()
    work()
    return Cost(time.perf_counter() - begin, 0)


@torch.no_grad()
def _copied(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> Cost:
    begin = time.perf_counter()
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    return Cost(time.perf_counter() - begin, 0)


def _raw(tensors: list[torch.Tensor], path: Path) -> Cost:
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            file.write(tensor.numpy())
        os.fsync(file.fileno())
    return Cost(time.perf_counter() - begin, 0)


def _row(what: str, measured: tuple[Cost, Cost, float], limit: float, size: int = 0) -> Row:
    ours, theirs, ratio = measured
    speed = f", {size / ours.seconds / _GB:.2f} GB/s" if size else ""
    return Row(what, _against(ours.seconds, theirs.seconds) + speed, ratio, limit)


def _against(ours: float, theirs: float) -> str:
    return f"{ours * 1e3:.1f} ms against {theirs * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
