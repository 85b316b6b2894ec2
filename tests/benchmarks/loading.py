"""What it adds to each batch that the workers of a loader send the states of their generators along."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from tests.benchmarks.measure import Row, table
from trackopt.run import loader_state

if TYPE_CHECKING:
    from collections.abc import Iterator

_TIMES = 7  # alternations of passes with and without
_LIMIT = 1.1


class Images(Dataset[Any]):
    """Images of random noise, each with a random crop and flip."""

    def __len__(self) -> int:
        """Return the number of images."""
        return 4096

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return one image."""
        image = torch.rand(3, 40, 40)
        left, top = torch.randint(8, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        return image.flip(2) if torch.rand(()) < 0.5 else image


def milliseconds(batches: Iterator[Any]) -> float:
    """Return the time of a batch; the workers have started with the first one."""
    next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - begin) / count * 1000


def main() -> bool:
    """Print the table; True if the ratio is within its limit."""
    loader = DataLoader(Images(), 64, shuffle=True, num_workers=2)
    pairs = [(milliseconds(iter(loader)), milliseconds(loader_state.begin_pass(loader))) for _ in range(_TIMES)]
    bare = statistics.median(one for one, _ in pairs)
    ratio = statistics.median(other / one for one, other in pairs)
    figures = f"{bare:.2f} ms without the states, {bare * ratio:.2f} ms with them"
    return table("Loading", [Row("a batch of 64 images, 2 workers", figures, ratio, _LIMIT)])
