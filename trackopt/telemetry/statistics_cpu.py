"""Statistics of tensors in the host's memory, each element read from it once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from trackopt.telemetry.reductions import reductions
from trackopt.telemetry.vectors import count_elements, is_vector, vectors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

#: The share of the deviations in the sum of squares below which float64 has lost them.
SPREAD = 1e-6


class Totals(NamedTuple):
    """Sums over all elements of some tensors, and their extremes.

    Attributes:
        size: The number of elements.
        sum: Their sum.
        squares: The sum of their squares.
        low: The smallest; NaN if any element is NaN.
        high: The largest; NaN if any element is NaN.
    """

    size: int
    sum: float
    squares: float
    low: float
    high: float


def totals(tensors: Iterable[Tensor]) -> Totals | None:
    """Return the totals of tensors of the CPU, of any dtype and layout; ``None`` without elements."""
    size, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    read = reductions.sums
    for tensor in tensors:
        begin = size
        for vector in (tensor,) if is_vector(tensor) else vectors(tensor):
            if count := vector.numel():
                sums = read(vector)
                size += count
                total += sums.sum
                squares += sums.squares
                if sums.low < low or sums.low != sums.low:
                    low = sums.low
                if sums.high > high or sums.high != sums.high:
                    high = sums.high
        if tensor.layout is not torch.strided and (zeros := count_elements([tensor]) - size + begin):
            size, low, high = size + zeros, min(low, 0.0), max(high, 0.0)
    return Totals(size, total, squares, low, high) if size else None


def squared_deviations(tensors: Sequence[Tensor], read: Totals) -> float:
    """Return the sum of the squared deviations from the mean, from the totals, or from the tensors if these lost it."""
    size, total, squares, low, high = read
    if low == high:
        return 0.0
    if not squares < math.inf:
        return math.inf if math.isfinite(low) and math.isfinite(high) else math.nan
    deviations = squares - total * (total / size)
    if deviations > SPREAD * squares:
        return deviations
    mean, found = total / size, 0.0
    for tensor in tensors:
        stored = 0
        for vector in vectors(tensor):
            centered = vector.double() - mean
            found += torch.dot(centered, centered).item()
            stored += vector.numel()
        found += (count_elements([tensor]) - stored) * mean * mean  # zeros that a sparse tensor does not store
    return found


def squares(tensors: Iterable[Tensor]) -> float | None:
    """Return the sum of the squares of all elements; ``None`` without elements."""
    total, is_empty = 0.0, True
    read = reductions.squares
    for tensor in tensors:
        for vector in (tensor,) if is_vector(tensor) else vectors(tensor):
            if vector.numel():
                is_empty = False
                total += read(vector)
    return None if is_empty else total
