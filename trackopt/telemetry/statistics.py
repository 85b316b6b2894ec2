"""Statistics of many tensors at once, each read from memory once, with one transfer to the host.

Tensors on the CPU yield their sum and their sum of squares, and are read again if these have lost the deviations
(`statistics_cpu`). Results from a device are not waited for (`statistics_device`, `AsyncMetrics`). Parts are combined
in float64 on the host.
"""

from __future__ import annotations

import math
from itertools import chain, islice
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trackopt.telemetry import statistics_cpu, statistics_device
from trackopt.telemetry.async_scalars import DeviceToHostCopy
from trackopt.telemetry.vectors import vector
from trackopt.utils.moments import Moments, merge_moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from trackopt.telemetry.statistics_cpu import Totals

    Lists = Mapping[str, Sequence[Tensor]]

_is_cpu = attrgetter("is_cpu")


class Statistics(NamedTuple):
    """Statistics of all elements of a buffer in one parameter group.

    Attributes:
        norm: The L2 norm of all elements taken as one vector.
        mean: Their mean.
        std: Their population standard deviation (divided by n, not n - 1).
        min: The smallest.
        max: The largest.
    """

    norm: float
    mean: float
    std: float
    min: float
    max: float


class RawStatistics(NamedTuple):
    """Statistics of an optimizer at a step.

    Attributes:
        statistics: Of buffers, by name.
        norms: Of vectors, such as gradients, by name.
        dot_products: Input of ``cosine``, by the names of pairs.
        nonfinite_counts: The number of elements that are not finite, and of all elements, by name; only if this
            process does not hold all of them.
    """

    statistics: dict[str, Statistics]
    norms: dict[str, float]
    dot_products: dict[str, list[float]]
    nonfinite_counts: dict[str, tuple[float, float]]


def measure(buffers: Lists, vectors: Lists) -> tuple[dict[str, Statistics], dict[str, float]]:
    """Compute the statistics of each named list of buffers, and the L2 norm of each named list of vectors.

    Tensors may be dense, sparse or quantized, of any floating or complex dtype and of any layout; a complex number
    counts as two real ones, and elements that a sparse tensor does not store are zeros. NaN and infinity show in the
    result as they would in a float64 computation.

    Args:
        buffers: For each name the tensors to describe together; empty ones are skipped.
        vectors: For each name the tensors whose common norm is wanted, such as gradients.

    Returns:
        The statistics by name and the norms by name; a name without any element has none.

    Example:
        >>> statistics, norms = measure({"exp_avg": [torch.tensor([3.0, 4.0])]}, {"grad": [torch.tensor([6.0, 8.0])]})
        >>> statistics["exp_avg"].norm, statistics["exp_avg"].mean, norms["grad"]
        (5.0, 3.5, 10.0)
    """
    scalars, finish = launch(buffers, vectors)
    return finish(DeviceToHostCopy(scalars).numbers())


def launch(
    buffers: Lists, vectors: Lists
) -> tuple[list[Tensor], Callable[[Sequence[float]], tuple[dict[str, Statistics], dict[str, float]]]]:
    """Read the tensors as `measure` does, without waiting for a device.

    Returns:
        Scalars that may be on devices, and a function that takes their numbers and returns the results of `measure`.
    """
    tensors = [*chain(*buffers.values(), *vectors.values())]
    if all(map(_is_cpu, tensors)):
        results = _describe_all(buffers), _norms_of_all(vectors)
        return [], lambda _: results
    cpu_buffers, cpu_vectors = (_select(lists, cpu=True) for lists in (buffers, vectors))
    on_device = [_select(lists, cpu=False) for lists in (buffers, vectors)]
    totals = {name: statistics_cpu.totals(tensors) for name, tensors in cpu_buffers.items()}
    moments = {name: [] if t is None else [_moments(cpu_buffers[name], t)] for name, t in totals.items()}
    cpu_norms = _norms_of_all(cpu_vectors)
    sizes, scalars, norm_counts = statistics_device.launch(*on_device)

    def finish(numbers: Sequence[float]) -> tuple[dict[str, Statistics], dict[str, float]]:
        rest = iter(numbers)
        device_parts = {
            name: [statistics_device.moments(size, *islice(rest, 4)) for size in part_sizes]
            for name, part_sizes in sizes.items()
        }
        parts = {name: moments[name] + device_parts[name] for name in moments}
        device_norms = {name: [*islice(rest, count)] for name, count in norm_counts.items()}
        norms = {name: [cpu_norms[name], *own] if name in cpu_norms else own for name, own in device_norms.items()}
        return (
            {name: combine(some) for name, some in parts.items() if some},
            {name: math.hypot(*some) for name, some in norms.items() if some},
        )

    return scalars, finish


def _describe_all(buffers: Lists) -> dict[str, Statistics]:
    return {
        name: describe(tensors, totals)
        for name, tensors in buffers.items()
        if (totals := statistics_cpu.totals(tensors)) is not None
    }


def describe(tensors: Sequence[Tensor], totals: Totals) -> Statistics:
    """Return the statistics of tensors of the CPU from their totals."""
    size, total, squares, low, high = totals
    deviations = statistics_cpu.squared_deviations(tensors, totals)
    return Statistics(math.sqrt(squares), total / size, math.sqrt(deviations / size), low, high)


def _norms_of_all(vectors: Lists) -> dict[str, float]:
    return {
        name: math.sqrt(squares)
        for name, tensors in vectors.items()
        if (squares := statistics_cpu.squares(tensors)) is not None
    }


def _moments(tensors: Sequence[Tensor], totals: Totals) -> Moments:
    deviations = statistics_cpu.squared_deviations(tensors, totals)
    return Moments(totals.size, totals.sum / totals.size, deviations, totals.low, totals.high)


def _select(lists: Lists, *, cpu: bool) -> dict[str, list[Tensor]]:
    return {name: [tensor for tensor in tensors if _is_cpu(tensor) == cpu] for name, tensors in lists.items()}


def combine(parts: Iterable[Moments]) -> Statistics:
    """Return the statistics of all elements from the moments of their parts."""
    total = merge_moments(parts)
    norm = math.inf if math.isinf(total.min) or math.isinf(total.max) else total.norm
    return Statistics(norm, total.mean, total.std, total.min, total.max)


def count_nonfinite(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements that are not finite."""
    return sum(flat.numel() - int(torch.isfinite(flat).sum()) for flat in map(vector, tensors))
