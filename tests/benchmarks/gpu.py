"""What trackopt costs a transformer of 125 million parameters on a GPU: the step, the save, and steps beside a save."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import trackopt
from tests.benchmarks.measure import Row, table, without_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMES = 9
_STEPS = 20  # between two turns
_GB = 1e9


@dataclass(frozen=True)
class Size:
    """The size of the transformer; the default has 125 million parameters.

    Attributes:
        layers: Its blocks.
        width: The width of a token.
        heads: Of attention.
        words: In its vocabulary.
        tokens: Of a batch: rows and columns.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    words: int = 50_257
    tokens: tuple[int, int] = (8, 512)


class Transformer(nn.Module):
    """A transformer whose output layer shares the weight of its embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(size.words, size.width)
        self.blocks = nn.TransformerEncoder(block, size.layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of each token."""
        return nn.functional.linear(self.blocks(self.embedding(tokens)), self.embedding.weight)


class Training:
    """A model in bfloat16 autocast with a fused AdamW, and one batch."""

    def __init__(self, device: str, size: Size) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = Transformer(size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._tokens = torch.randint(size.words, size.tokens, device=device)

    def step(self) -> torch.Tensor:
        """Take a step; return its loss."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(self._tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), self._tokens.flatten())
        loss.backward()
        self.optimizer.step()
        return loss

    def milliseconds(self, log: Callable[[torch.Tensor], object] = lambda _: None) -> float:
        """Return the time of a step, with what ``log`` does after it."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(_STEPS):
            log(self.step())
        self.wait()
        return (time.perf_counter() - begin) / _STEPS * 1000

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def state(self) -> dict[str, Any]:
        """Return what a script saves."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def main(device: str = "cuda", size: Size = Size()) -> bool:
    """Print the table; whether every limit is kept. Without a device there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("\ngpu: this machine has no CUDA device\n")
        return True
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    training = Training(device, size)
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        training.milliseconds()
        rows = [_added(training, Path(folder)), *_saves(training, Path(folder))]
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return table(f"gpu: {name}, torch {torch.__version__}", rows)


def _added(training: Training, folder: Path) -> Row:
    """What the statistics add to a step."""
    with trackopt.wrap(training.optimizer, dir=folder / "added", sinks=()) as run:
        pairs = []
        for _ in range(_TIMES):
            with without_hooks(training.optimizer):
                bare = training.milliseconds()
            pairs.append((training.milliseconds(lambda loss: run.step(loss=loss)), bare))
    step = statistics.median(bare for _, bare in pairs)
    ratio = statistics.median(ours / bare for ours, bare in pairs)
    return Row("a step with statistics, to one without", f"bare {step:.2f} ms", ratio, 1.03)


def _saves(training: Training, folder: Path) -> list[Row]:
    """The stall of a save, its time to the disk, and steps while it is written."""
    nbytes = sum(t.nbytes for p in training.model.parameters() for t in (p, *training.optimizer.state[p].values()))
    run = trackopt.wrap(training.optimizer, model=training.model, dir=folder / "run", sinks=(), stats=None, keep=1)
    training.step()
    run.step()
    run.save(wait=True)
    stalls, writes, plain, asynchronous, beside = [], [], [], [], []
    bare = statistics.median(training.milliseconds() for _ in range(3))
    writer = dcp.FileSystemWriter(folder / "dcp")
    for _ in range(_TIMES):
        training.wait()
        stalls.append(_seconds(run.save))
        beside.append(training.milliseconds())
        run.save(wait=True)
        writes.append(_seconds(lambda: run.save(wait=True)))
        plain.append(_seconds(lambda: torch.save(training.state(), folder / "plain.pt")))
        begin = time.perf_counter()
        future = dcp.async_save(training.state(), storage_writer=writer)
        asynchronous.append(time.perf_counter() - begin)
        future.result()
    run.close()
    stall, write, saved, other, slow = map(statistics.median, (stalls, writes, plain, asynchronous, beside))
    return [
        Row("stall of a save, to torch.save", f"{stall * 1e3:.1f} ms against {saved * 1e3:.1f} ms", stall / saved, 0.1),
        Row("stall, to DCP's async_save", f"{stall * 1e3:.1f} ms against {other * 1e3:.1f} ms", stall / other, 1.0),
        Row("on the disk, to torch.save", f"{nbytes / write / _GB:.2f} GB/s", write / saved, 1.0),
        Row("a step beside the write of a save", f"{slow:.2f} ms against {bare:.2f} ms", slow / bare, 1.1),
    ]


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
