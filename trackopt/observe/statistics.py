"""Statistics of many tensors at once, each read from memory once, with one transfer to the host.

Small tensors of the CPU are gathered (``small``). Others are read piece by piece, small enough to stay in the
processor's cache between the few passes over it; the pieces are combined in float64 on the host by the pairwise
formula of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
On the CPU a piece yields its sum and its sum of squares, and is read again where these do not tell its deviations. A
device, which is not waited for, subtracts the mean at once.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trackopt.observe.small import Totals, gather, is_plain, totals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PIECE = 1 << 18  # elements: 1 MB of float32
_SMALL = 1 << 15  # elements: smaller tensors are copied together
_GATHERED = 1 << 17  # elements: up to this size
_CANCELS = 0.9  # of the sum of squares: if the mean makes up more, float32 has lost the deviations
_UNDERFLOWS = 1e-30  # sums of squares below this may have lost elements


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


class _Piece(NamedTuple):
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
    found = totals([*buffers.values(), *vectors.values()])
    statistics, norms = {}, {}
    large, long = {}, {}
    for (name, tensors), each in zip(buffers.items(), found, strict=False):
        if each is None:
            large[name] = tensors
        else:
            statistics[name] = _describe(each)
    for (name, tensors), each in zip(vectors.items(), found[len(buffers) :], strict=True):
        if each is None:
            long[name] = tensors
        else:
            norms[name] = math.sqrt(each.squares)
    if large or long:
        _measure_large(large, long, statistics, norms)
    return statistics, norms


def _describe(found: Totals) -> Statistics:
    mean = found.sum / found.size
    variance = max(found.squares / found.size - mean * mean, 0.0) if found.squares < math.inf else math.nan
    return Statistics(math.sqrt(found.squares), mean, math.sqrt(variance), found.low, found.high)


def _measure_large(
    buffers: Mapping[str, Sequence[Tensor]],
    vectors: Mapping[str, Sequence[Tensor]],
    statistics: dict[str, Statistics],
    norms: dict[str, float],
) -> None:
    pieces = {name: found for name, tensors in buffers.items() if (found := list(_pieces(tensors)))}
    here = {name: list(_pieces([t for t in tensors if t.is_cpu])) for name, tensors in vectors.items()}
    there = {
        name: [v for t in tensors if not t.is_cpu and (v := vector(t)).numel()] for name, tensors in vectors.items()
    }
    scalars = [scalar for each in pieces.values() for piece in each for scalar in _moments(piece)]
    scalars += [_squares(piece) for each in here.values() for piece in each]
    scalars += [norm for each in there.values() if each for norm in torch._foreach_norm(each)]
    values = iter(_fetch(scalars))
    for name, parts in pieces.items():
        rows = (list(islice(values, 4)) for _ in parts)
        statistics[name] = _combine([_piece(part, *row) for part, row in zip(parts, rows, strict=True)])
    lengths = {name: [_length(part, next(values)) for part in parts] for name, parts in here.items()}
    for name, flat in there.items():
        if whole := lengths[name] + list(islice(values, len(flat))):
            norms[name] = math.hypot(*whole)


def vector(tensor: Tensor) -> Tensor:
    """All stored elements as one real vector of float32 or better, without a copy where that is possible.

    Of a tensor that is spread over processes (DTensor) the part that is here.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.flatten()
    return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What is read as one: a part of a tensor, or several small ones.

    These are copied only while they are read, so that the copies take turns in the same memory.
    """
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if not is_plain(tensor):
            tensor = vector(tensor)
        elements = tensor.numel()
        if elements >= _SMALL:
            yield from ([part] for part in torch.split(vector(tensor), _PIECE))
        elif elements:
            if waiting and (size + elements > _GATHERED or tensor.device != waiting[0].device):
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
    """Of a piece on the CPU its sum and sum of squares; elsewhere its mean and its squared deviations; the extremes."""
    piece = _read(tensors)
    low, high = torch.aminmax(piece)
    if piece.is_cpu:
        return piece.sum(), piece.square().sum(), low, high
    mean = piece.mean()
    deviations = piece - mean
    return mean, torch.dot(deviations, deviations), low, high


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of a piece on the CPU, added pairwise: `dot` and `norm` lose digits of like numbers."""
    return _read(tensors).square().sum()


def _length(tensors: list[Tensor], squares: float) -> float:
    """The norm of a piece, from its sum of squares where float32 held that."""
    if _UNDERFLOWS < squares < math.inf:
        return math.sqrt(squares)
    return math.sqrt(_squares([each.double() for each in map(vector, tensors)]).item())


def _fetch(scalars: Sequence[Tensor]) -> list[float]:
    if not scalars:
        return []
    if len({(scalar.device, scalar.dtype) for scalar in scalars}) > 1:
        scalars = [scalar.to(scalars[0].device, torch.float64) for scalar in scalars]
    values: list[float] = torch.stack(list(scalars)).tolist()  # the step's one transfer to the host
    return values


def _piece(tensors: list[Tensor], first: float, second: float, low: float, high: float) -> _Piece:
    count = sum(map(Tensor.numel, tensors))
    if not tensors[0].is_cpu:
        return _Piece(count, first, second, low, high)
    if not (math.isfinite(low) and math.isfinite(high)):
        return _Piece(count, first / count, second, low, high)
    if low == high:
        return _Piece(count, low, 0.0, low, high)
    if _UNDERFLOWS < second < math.inf and first * first / count < _CANCELS * second:
        return _Piece(count, first / count, second - first * first / count, low, high)
    wide = _read(tensors).double()
    mean = wide.mean()
    wide -= mean
    return _Piece(count, mean.item(), torch.dot(wide, wide).item(), low, high)


def _combine(pieces: Sequence[_Piece]) -> Statistics:
    count = sum(piece.size for piece in pieces)
    lows, highs = [piece.low for piece in pieces], [piece.high for piece in pieces]
    low, high = _nan_or(min(lows), lows), _nan_or(max(highs), highs)
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        norm = math.nan if math.isnan(low) else math.inf
        return Statistics(norm, sum(piece.mean for piece in pieces) / len(pieces), math.nan, low, high)
    mean = math.fsum(piece.size * piece.mean for piece in pieces) / count
    squares = math.fsum(piece.deviations + piece.size * (piece.mean - mean) ** 2 for piece in pieces)
    return Statistics(math.sqrt(squares + count * mean * mean), mean, math.sqrt(squares / count), low, high)


def _nan_or(value: float, values: list[float]) -> float:
    """Python's min and max overlook NaN; torch's do not."""
    return math.nan if any(map(math.isnan, values)) else value
