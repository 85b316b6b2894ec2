"""Statistics of many tensors at once, each read from memory once, with one transfer to the host.

Small tensors of the CPU are gathered (``small``), others are read piece by piece (``near``). They yield their sum and
their sum of squares, and are read again where these do not tell their deviations. What is on a device is hardly cut,
and not waited for (`AsyncMetrics`): there the number of kernels counts. Parts are combined in float64 on the host by
the pairwise formula of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979).
"""

from __future__ import annotations

import math
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trackopt.telemetry import statistics_cpu
from trackopt.telemetry.async_scalars import DeviceToHostCopy
from trackopt.telemetry.statistics_small import Totals, gather, is_plain, totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_CANCELLATION_RATIO = 0.9  # of the sum of squares: if the mean makes up more, float32 has lost the deviations
_OUTLIER_RATIO = 1 - 1e-6  # the same of sums in float64
_NARROW = frozenset({torch.float16, torch.bfloat16})
_UNDERFLOWS = 1e-30  # sums of squares below this may have lost elements


# In elements, on a device: smaller tensors are copied together, up to this size.
_SMALL, _GATHERED = 1 << 20, 1 << 22


class Statistics(NamedTuple):
    """What is known of all the elements of a buffer in one parameter group.

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
    """What is known of an optimizer at a step.

    Attributes:
        statistics: Of buffers, by name.
        norms: Of vectors, such as gradients, by name.
        dot_products: What ``cosine`` takes, by the names of pairs.
        nonfinite_counts: How many elements are not finite, of how many, by name; only where this process
            cannot tell by itself.
    """

    statistics: dict[str, Statistics]
    norms: dict[str, float]
    dot_products: dict[str, list[float]]
    nonfinite_counts: dict[str, tuple[float, float]]


class Piece(NamedTuple):
    """What is known of a part of the elements, in the form in which parts are combined."""

    size: int
    mean: float
    m2: float  # sum of squares
    low: float
    high: float


def measure(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, Statistics], dict[str, float]]:
    """Statistics of each named list of buffers, and the L2 norm of each named list of vectors.

    Dense and sparse tensors of any floating or complex dtype and of any layout do; a complex number counts as two
    real ones. NaN and infinity show in the result as they would in a float64 computation.

    Args:
        buffers: For each name the tensors to describe together; empty ones are left out.
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
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[list[Tensor], Callable[[Sequence[float]], tuple[dict[str, Statistics], dict[str, float]]]]:
    """The part of ``compute`` that reads the tensors, without waiting for a device.

    Returns:
        Numbers that are still on devices, and what makes the results of ``compute`` of them.
    """
    found = iter(totals([*buffers.values(), *vectors.values()]))
    small = [{name: each for name in lists if (each := next(found)) is not None} for lists in (buffers, vectors)]
    statistics = {name: _describe(each) for name, each in small[0].items() if not _needs_second_pass(each)}
    norms = {name: math.sqrt(each.squares) for name, each in small[1].items()}
    large = {name: tensors for name, tensors in buffers.items() if name not in statistics}
    long = {name: tensors for name, tensors in vectors.items() if name not in norms}
    if not (large or long):
        return [], lambda _: (statistics, norms)
    scattered = not all(_is_cpu(tensor) for each in (*large.values(), *long.values()) for tensor in each)
    here = [_chosen(each, near=True) if scattered else each for each in (large, long)]
    there = [_chosen(each, near=False) if scattered else {} for each in (large, long)]
    pieces, lengths = _read_cpu(*here)
    sizes, scalars, roots = launch_device(*there)

    def finish(numbers: Sequence[float]) -> tuple[dict[str, Statistics], dict[str, float]]:
        following = iter(numbers)
        for name, parts in pieces.items():
            rest = [_device_moments(size, *islice(following, 4)) for size in sizes.get(name, ())]
            if parts or rest:
                statistics[name] = combine(parts + rest)
        for name, norms_here in lengths.items():
            if whole := norms_here + list(islice(following, roots.get(name, 0))):
                norms[name] = math.hypot(*whole)
        return statistics, norms

    return scalars, finish


def _chosen(lists: Mapping[str, Sequence[Tensor]], *, near: bool) -> dict[str, list[Tensor]]:
    return {name: [tensor for tensor in tensors if _is_cpu(tensor) == near] for name, tensors in lists.items()}


def _is_cpu(tensor: Tensor) -> bool:
    """Whether its elements are in the memory of the host."""
    return tensor.is_cpu


def _needs_second_pass(found: Totals) -> bool:
    """Whether the mean makes up so much that even float64 has lost the deviations."""
    return found.low < found.high and found.sum * found.sum / found.size > _OUTLIER_RATIO * found.squares


def _describe(found: Totals) -> Statistics:
    mean = found.sum / found.size
    variance = max(found.squares / found.size - mean * mean, 0.0) if found.squares < math.inf else math.nan
    variance = 0.0 if found.low == found.high else variance
    return Statistics(math.sqrt(found.squares), mean, math.sqrt(variance), found.low, found.high)


def _read_cpu(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[Piece]], dict[str, list[float]]]:
    """What is known of the parts of buffers on the CPU, and the norms of vectors there."""
    found, squares = statistics_cpu.totals(buffers.values(), vectors.values())
    parts = {
        name: [] if each is None else _parts_of(tensors, each)
        for (name, tensors), each in zip(buffers.items(), found, strict=True)
    }
    lengths = {
        name: [] if each is None else [_length(tensors, each)]
        for (name, tensors), each in zip(vectors.items(), squares, strict=True)
    }
    return parts, lengths


def launch_device(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[int]], list[Tensor], dict[str, int]]:
    """The sizes of the pieces of buffers on devices, the numbers that describe all, and how many norms each has."""
    parts = {name: list(_parts(tensors)) for name, tensors in buffers.items()}
    found = {name: _device_norms(tensors) for name, tensors in vectors.items()}
    scalars = []
    for part in (part for each in parts.values() for part in each):
        whole = vector(gather(part) if len(part) > 1 else part[0])
        variance, mean = torch.var_mean(whole, correction=0)
        scalars += [mean, variance, *torch.aminmax(whole)]
    scalars += chain.from_iterable(found.values())
    sizes = {name: [sum(map(Tensor.numel, part)) for part in each] for name, each in parts.items()}
    return sizes, scalars, {name: len(each) for name, each in found.items()}


def _device_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, which float32 holds; those of float16 and bfloat16 are not copied for it: a device is full."""
    plain = [tensor.detach() if is_plain(tensor) else vector(tensor) for tensor in tensors]
    narrow = [each for each in plain if each.numel() and each.dtype in _NARROW]
    wide = [each for each in plain if each.numel() and each.dtype not in _NARROW]
    found = list(torch._foreach_norm(narrow, 2, torch.float32)) if narrow else []
    return found + list(torch._foreach_norm(wide)) if wide else found


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What is read as one on a device: a tensor, or several small ones."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in map(statistics_cpu.flat, tensors):
        elements = tensor.numel()
        if elements >= _SMALL:
            yield [tensor]
        elif elements:
            if waiting and (size + elements > _GATHERED or tensor.device != waiting[0].device):
                yield waiting
                waiting, size = [], 0
            waiting.append(tensor)
            size += elements
    if waiting:
        yield waiting


def vector(tensor: Tensor) -> Tensor:
    """All stored elements as one real vector of float32 or better, without a copy where that is possible.

    Of a tensor that is spread over processes (DTensor) the part that is here.
    """
    return statistics_cpu.real(statistics_cpu.flat(tensor))


def _length(tensors: Sequence[Tensor], squares: float) -> float:
    """The norm of vectors on the CPU, from the sum of squares where float32 held that."""
    if _UNDERFLOWS < squares < math.inf:
        return math.sqrt(squares)
    wide = map(Tensor.double, statistics_cpu.pieces(tensors))
    return math.sqrt(sum(torch.dot(each, each).item() for each in wide))


def _parts_of(tensors: Sequence[Tensor], found: Totals) -> list[Piece]:
    """What is known of buffers on the CPU: from their totals, or by a second look where these do not tell."""
    size, first, second, low, high = found
    if not (math.isfinite(low) and math.isfinite(high)):
        return [Piece(size, first / size, second, low, high)]
    if low == high:
        return [Piece(size, low, 0.0, low, high)]
    if _UNDERFLOWS < second < math.inf and first * first / size < _CANCELLATION_RATIO * second:
        return [Piece(size, first / size, second - first * first / size, low, high)]
    return [_looked_at(piece.double(), low, high) for piece in statistics_cpu.pieces(tensors)]


def _looked_at(piece: Tensor, low: float, high: float) -> Piece:
    mean = piece.mean()
    apart = piece - mean
    return Piece(piece.numel(), mean.item(), torch.dot(apart, apart).item(), low, high)


def _device_moments(size: int, mean: float, variance: float, low: float, high: float) -> Piece:
    return Piece(size, mean, variance * size, low, high)


def combine(pieces: Sequence[Piece]) -> Statistics:
    """The statistics of all elements from those of their parts."""
    count = sum(piece.size for piece in pieces)
    lows, highs = [piece.low for piece in pieces], [piece.high for piece in pieces]
    low, high = _nan_or(min(lows), lows), _nan_or(max(highs), highs)
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        norm = math.nan if math.isnan(low) else math.inf
        return Statistics(norm, sum(piece.mean for piece in pieces) / len(pieces), math.nan, low, high)
    mean = sum(piece.size * piece.mean for piece in pieces) / count
    squares = sum(piece.m2 + piece.size * (piece.mean - mean) * (piece.mean - mean) for piece in pieces)
    return Statistics(math.sqrt(squares + count * mean * mean), mean, math.sqrt(squares / count), low, high)


def nonfinite(tensors: Iterable[Tensor]) -> int:
    """How many elements are not finite."""
    return sum(each.numel() - int(torch.isfinite(each).sum()) for each in map(vector, tensors))


def _nan_or(value: float, values: list[float]) -> float:
    """Python's min and max overlook NaN; torch's do not."""
    return math.nan if any(map(math.isnan, values)) else value
