"""Statistics of many tensors at once, each read from memory once, with one transfer to the host.

Small tensors of the CPU are gathered (``small``). Others are read piece by piece, small enough to stay in the
processor's cache between the few passes over it; the pieces are combined in float64 on the host by the pairwise
formula of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
On the CPU a piece yields its sum and its sum of squares, and is read again where these do not tell its deviations.
What is on a device is not cut, and not waited for (`Reading`): there the number of kernels counts.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trackopt.observe.reading import Transfer
from trackopt.observe.small import Totals, gather, is_plain, is_spread, totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_CANCELS = 0.9  # of the sum of squares: if the mean makes up more, float32 has lost the deviations
_UNDERFLOWS = 1e-30  # sums of squares below this may have lost elements


class _Sizes(NamedTuple):
    """How tensors are cut into pieces, in elements."""

    small: int  # smaller tensors are copied together
    gathered: int  # up to this size
    piece: int  # a larger tensor is cut into pieces of this size


_NEAR = _Sizes(1 << 15, 1 << 17, 1 << 18)  # 1 MB of float32 stays in the cache
_FAR = _Sizes(1 << 20, 1 << 22, 1 << 62)  # what counts on a device is how many kernels are launched


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


class Measured(NamedTuple):
    """What is known of an optimizer at a step.

    Attributes:
        statistics: Of buffers, by name.
        norms: Of vectors, such as gradients, by name.
        terms: What ``cosine`` takes, by the names of pairs.
        missing: How many elements are not finite, of how many, by name; only where this process cannot tell by itself.
    """

    statistics: dict[str, Statistics]
    norms: dict[str, float]
    terms: dict[str, list[float]]
    missing: dict[str, tuple[float, float]]


class Piece(NamedTuple):
    """What is known of a part of the elements, in the form in which parts are combined."""

    size: int
    mean: float
    deviations: float  # sum of squares
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
    scalars, finish = begin(buffers, vectors)
    return finish(Transfer(scalars).numbers())


def begin(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[list[Tensor], Callable[[Sequence[float]], tuple[dict[str, Statistics], dict[str, float]]]]:
    """The part of ``measure`` that reads the tensors, without waiting for a device.

    Returns:
        Numbers that are still on devices, and what makes the results of ``measure`` of them.
    """
    found = iter(totals([*buffers.values(), *vectors.values()]))
    small = [{name: each for name in lists if (each := next(found)) is not None} for lists in (buffers, vectors)]
    statistics = {name: _describe(each) for name, each in small[0].items()}
    norms = {name: math.sqrt(each.squares) for name, each in small[1].items()}
    large = {name: tensors for name, tensors in buffers.items() if name not in statistics}
    long = {name: tensors for name, tensors in vectors.items() if name not in norms}
    if not (large or long):
        return [], lambda _: (statistics, norms)
    pieces, lengths = _read_near(*(_chosen(each, near=True) for each in (large, long)))
    sizes, scalars, roots = read_far(*(_chosen(each, near=False) for each in (large, long)))

    def finish(numbers: Sequence[float]) -> tuple[dict[str, Statistics], dict[str, float]]:
        following = iter(numbers)
        for name, here in pieces.items():
            there = [_far_piece(size, *islice(following, 4)) for size in sizes[name]]
            if here or there:
                statistics[name] = combine(here + there)
        for name, norms_here in lengths.items():
            if whole := norms_here + list(islice(following, roots[name])):
                norms[name] = math.hypot(*whole)
        return statistics, norms

    return scalars, finish


def _chosen(lists: Mapping[str, Sequence[Tensor]], *, near: bool) -> dict[str, list[Tensor]]:
    return {name: [tensor for tensor in tensors if _is_near(tensor) == near] for name, tensors in lists.items()}


def _is_near(tensor: Tensor) -> bool:
    """Whether its elements are in the memory of the host."""
    return tensor.is_cpu


def _describe(found: Totals) -> Statistics:
    mean = found.sum / found.size
    variance = max(found.squares / found.size - mean * mean, 0.0) if found.squares < math.inf else math.nan
    return Statistics(math.sqrt(found.squares), mean, math.sqrt(variance), found.low, found.high)


def _read_near(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[Piece]], dict[str, list[float]]]:
    """The pieces of buffers on the CPU, and the norms of the pieces of vectors."""
    parts = {name: list(_pieces(tensors)) for name, tensors in buffers.items()}
    long = {name: list(_pieces(tensors)) for name, tensors in vectors.items()}
    scalars = [scalar for each in parts.values() for part in each for scalar in _moments(part)]
    scalars += [_squares(part) for each in long.values() for part in each]
    values = iter(Transfer(scalars).numbers())
    pieces = {name: [_piece(part, *islice(values, 4)) for part in each] for name, each in parts.items()}
    lengths = {name: [_length(part, next(values)) for part in each] for name, each in long.items()}
    return pieces, lengths


def read_far(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[int]], list[Tensor], dict[str, int]]:
    """The sizes of the pieces of buffers on devices, the numbers that describe all, and how many norms each has."""
    parts = {name: list(_pieces(tensors, _FAR)) for name, tensors in buffers.items()}
    flat = {name: [v for v in map(vector, tensors) if v.numel()] for name, tensors in vectors.items()}
    scalars = []
    for part in (part for each in parts.values() for part in each):
        whole = _read(part)
        variance, mean = torch.var_mean(whole, correction=0)
        scalars += [mean, variance, *torch.aminmax(whole)]
    scalars += [norm for each in flat.values() if each for norm in torch._foreach_norm(each)]
    sizes = {name: [sum(map(Tensor.numel, part)) for part in each] for name, each in parts.items()}
    return sizes, scalars, {name: len(each) for name, each in flat.items()}


def vector(tensor: Tensor) -> Tensor:
    """All stored elements as one real vector of float32 or better, without a copy where that is possible.

    Of a tensor that is spread over processes (DTensor) the part that is here.
    """
    tensor = tensor.detach()
    if is_spread(tensor):
        tensor = tensor.to_local()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.flatten()
    return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()


def _pieces(tensors: Sequence[Tensor], sizes: _Sizes = _NEAR) -> Iterator[list[Tensor]]:
    """What is read as one: a part of a tensor, or several small ones.

    These are copied only while they are read, so that the copies take turns in the same memory.
    """
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if not is_plain(tensor):
            tensor = vector(tensor)
        elements = tensor.numel()
        if elements >= sizes.small:
            yield from ([part] for part in torch.split(vector(tensor), sizes.piece))
        elif elements:
            if waiting and (size + elements > sizes.gathered or tensor.device != waiting[0].device):
                yield waiting
                waiting, size = [], 0
            waiting.append(tensor)
            size += elements
    if waiting:
        yield waiting


def _read(piece: list[Tensor]) -> Tensor:
    """One vector without gaps, since it is read several times."""
    return vector(gather(piece) if len(piece) > 1 else piece[0]).contiguous()


def _moments(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, the sum of squares, the lowest and the highest of a piece on the CPU."""
    piece = _read(tensors)
    return piece.sum(), piece.square().sum(), *torch.aminmax(piece)


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of a piece on the CPU, added pairwise: `dot` and `norm` lose digits of like numbers."""
    return _read(tensors).square().sum()


def _length(tensors: list[Tensor], squares: float) -> float:
    """The norm of a piece, from its sum of squares where float32 held that."""
    if _UNDERFLOWS < squares < math.inf:
        return math.sqrt(squares)
    return math.sqrt(_squares([each.double() for each in map(vector, tensors)]).item())


def _piece(tensors: list[Tensor], first: float, second: float, low: float, high: float) -> Piece:
    count = sum(map(Tensor.numel, tensors))
    if not (math.isfinite(low) and math.isfinite(high)):
        return Piece(count, first / count, second, low, high)
    if low == high:
        return Piece(count, low, 0.0, low, high)
    if _UNDERFLOWS < second < math.inf and first * first / count < _CANCELS * second:
        return Piece(count, first / count, second - first * first / count, low, high)
    wide = _read(tensors).double()
    mean = wide.mean()
    wide -= mean
    return Piece(count, mean.item(), torch.dot(wide, wide).item(), low, high)


def _far_piece(size: int, mean: float, variance: float, low: float, high: float) -> Piece:
    return Piece(size, mean, variance * size, low, high)


def combine(pieces: Sequence[Piece]) -> Statistics:
    """The statistics of all elements from those of their parts."""
    count = sum(piece.size for piece in pieces)
    lows, highs = [piece.low for piece in pieces], [piece.high for piece in pieces]
    low, high = _nan_or(min(lows), lows), _nan_or(max(highs), highs)
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        norm = math.nan if math.isnan(low) else math.inf
        return Statistics(norm, sum(piece.mean for piece in pieces) / len(pieces), math.nan, low, high)
    mean = math.fsum(piece.size * piece.mean for piece in pieces) / count
    squares = math.fsum(piece.deviations + piece.size * (piece.mean - mean) ** 2 for piece in pieces)
    return Statistics(math.sqrt(squares + count * mean * mean), mean, math.sqrt(squares / count), low, high)


def nonfinite(tensors: Iterable[Tensor]) -> int:
    """How many elements are not finite."""
    return sum(each.numel() - int(torch.isfinite(each).sum()) for each in map(vector, tensors))


def _nan_or(value: float, values: list[float]) -> float:
    """Python's min and max overlook NaN; torch's do not."""
    return math.nan if any(map(math.isnan, values)) else value
