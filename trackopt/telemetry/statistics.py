"""Statistics of many tensors at once, each read from memory once, with one transfer to the host.

Tensors on the CPU yield their sum and their sum of squares, and are read again if these have lost the deviations
(`statistics_cpu`). Results from a device are not waited for (`statistics_device`, `AsyncMetrics`). Parts are combined
in float64 on the host.
"""

from __future__ import annotations

import math
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trackopt.telemetry import statistics_cpu, statistics_device
from trackopt.telemetry.async_scalars import DeviceToHostCopy
from trackopt.telemetry.vectors import vector
from trackopt.utils.moments import merge_moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from trackopt.telemetry.statistics_cpu import Totals
    from trackopt.utils.moments import Moments

    Lists = Mapping[str, Sequence[Tensor]]

_OUTLIER_RATIO = 1 - 1e-6  # of the sum of squares: if the mean makes up more, float64 has lost the deviations


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
    totals = iter(statistics_cpu.read_small([*buffers.values(), *vectors.values()]))
    small = [{name: total for name in lists if (total := next(totals)) is not None} for lists in (buffers, vectors)]
    statistics = {name: _describe(total) for name, total in small[0].items() if not _needs_second_pass(total)}
    norms = {name: math.sqrt(total.squares) for name, total in small[1].items()}
    buffers = {name: tensors for name, tensors in buffers.items() if name not in statistics}
    vectors = {name: tensors for name, tensors in vectors.items() if name not in norms}
    if not (buffers or vectors):
        return [], lambda _: (statistics, norms)
    on_device: list[Lists] = [{}, {}]
    if not all(map(_is_cpu, chain(*buffers.values(), *vectors.values()))):
        on_device = [_select(lists, cpu=False) for lists in (buffers, vectors)]
        buffers, vectors = (_select(lists, cpu=True) for lists in (buffers, vectors))
    cpu_moments, cpu_norms = statistics_cpu.read(buffers, vectors)
    sizes, scalars, norm_counts = statistics_device.launch(*on_device)

    def finish(numbers: Sequence[float]) -> tuple[dict[str, Statistics], dict[str, float]]:
        rest = iter(numbers)
        for name, parts in cpu_moments.items():
            device_parts = [statistics_device.moments(size, *islice(rest, 4)) for size in sizes.get(name, ())]
            if parts or device_parts:
                statistics[name] = combine(parts + device_parts)
        for name, parts_norms in cpu_norms.items():
            if all_norms := parts_norms + list(islice(rest, norm_counts.get(name, 0))):
                norms[name] = math.hypot(*all_norms)
        return statistics, norms

    return scalars, finish


def _select(lists: Lists, *, cpu: bool) -> dict[str, list[Tensor]]:
    return {name: [tensor for tensor in tensors if _is_cpu(tensor) == cpu] for name, tensors in lists.items()}


def _is_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _needs_second_pass(totals: Totals) -> bool:
    return totals.low < totals.high and totals.sum * totals.sum / totals.size > _OUTLIER_RATIO * totals.squares


def _describe(totals: Totals) -> Statistics:
    mean = totals.sum / totals.size
    variance = max(totals.squares / totals.size - mean * mean, 0.0) if totals.squares < math.inf else math.nan
    variance = 0.0 if totals.low == totals.high else variance
    return Statistics(math.sqrt(totals.squares), mean, math.sqrt(variance), totals.low, totals.high)


def combine(parts: Iterable[Moments]) -> Statistics:
    """Return the statistics of all elements from the moments of their parts."""
    total = merge_moments(parts)
    norm = math.inf if math.isinf(total.min) or math.isinf(total.max) else total.norm
    return Statistics(norm, total.mean, total.std, total.min, total.max)


def count_nonfinite(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements that are not finite."""
    return sum(flat.numel() - int(torch.isfinite(flat).sum()) for flat in map(vector, tensors))
