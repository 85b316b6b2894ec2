"""Statistics of tensors in the host's memory.

Lists of few elements are gathered into one vector and read by NumPy, whose calls cost least. Others are read in pieces
that stay in the cache between the passes over them.
"""

from __future__ import annotations

import math
from itertools import accumulate, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trackopt.telemetry.vectors import batches, count_zeros, flatten, flatten_in_memory_order, gather, is_plain, widen
from trackopt.utils.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# In elements.
_MAX_SMALL_LIST = 1 << 14  # a list that NumPy reads
_SMALL, _MAX_GATHERED = 1 << 15, 1 << 17  # smaller tensors are gathered, up to this size
_PIECE = 1 << 18  # 1 MB of float32
_ROW = 256  # whose squares are added in the order of memory

_CANCELLATION_RATIO = 0.9  # of the sum of squares: if the mean makes up more, float32 has lost the deviations
_UNDERFLOW = 1e-30  # sums of squares below this may have lost elements


class Totals(NamedTuple):
    """Sums over all elements of a list of tensors, in float64."""

    size: int
    sum: float
    squares: float
    low: float
    high: float


def read_small(lists: Sequence[Sequence[Tensor]]) -> list[Totals | None]:
    """Return the totals of each list; ``None`` if it is empty, large, or holds other than plain tensors of the CPU."""
    sizes = [small_size(tensors) for tensors in lists]
    ends = list(accumulate(filter(None, sizes), initial=0))
    if not ends.pop():
        return [None] * len(lists)
    starts = np.array(ends)
    flat = gather([tensor for size, tensors in zip(sizes, lists, strict=True) if size for tensor in tensors])
    values = flat.to(torch.float64).numpy()
    with np.errstate(all="ignore"):  # what is not finite shows in the result
        rows = zip(
            filter(None, sizes),
            np.add.reduceat(values, starts).tolist(),
            np.add.reduceat(values * values, starts).tolist(),
            np.minimum.reduceat(values, starts).tolist(),
            np.maximum.reduceat(values, starts).tolist(),
            strict=True,
        )
    return [Totals._make(next(rows)) if size else None for size in sizes]


def small_size(tensors: Sequence[Tensor]) -> int:
    """Return the number of elements of a list that `read_small` reads; 0 for any other list."""
    total = 0
    for tensor in tensors:
        if not (tensor.is_cpu and is_plain(tensor)):
            return 0
        total += tensor.numel()
        if total > _MAX_SMALL_LIST:
            return 0
    return total


def read(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[Moments]], dict[str, list[float]]]:
    """Return the moments of the parts of each list of buffers, and the norms of the parts of each list of vectors."""
    totals, squares = _piecewise_totals(buffers.values(), vectors.values())
    moments = {name: _moments(tensors, total) for (name, tensors), total in zip(buffers.items(), totals, strict=True)}
    norms = {
        name: [] if square is None else [_norm(tensors, square)]
        for (name, tensors), square in zip(vectors.items(), squares, strict=True)
    }
    return moments, norms


def _piecewise_totals(
    buffers: Iterable[Sequence[Tensor]], vectors: Iterable[Sequence[Tensor]]
) -> tuple[list[Totals | None], list[float | None]]:
    """Return the totals of each list of buffers, and the sum of squares of each list of vectors.

    Values that float32 cannot hold in the sum of a piece or the squares of a row are lost.
    """
    scalars: list[Tensor] = []
    sizes: list[tuple[int, int]] = []  # elements and pieces of each list of buffers
    for tensors in buffers:
        rows: list[Tensor] = []
        size, begin = 0, len(scalars)
        for piece in _pieces(tensors):
            size += piece.numel()
            rows += _row_norms(piece)
            scalars += [piece.sum(), *torch.aminmax(piece)]
        sizes.append((size, (len(scalars) - begin) // 3))
        scalars.append(_sum_of_squares(rows))
    norms = [[row for piece in _pieces(tensors) for row in _row_norms(piece)] for tensors in vectors]
    scalars += map(_sum_of_squares, norms)
    numbers = iter(torch.stack(scalars).tolist() if scalars else ())
    totals = [_add_up(size, [*islice(numbers, 3 * count + 1)]) for size, count in sizes]
    return totals, [number if rows else None for rows, number in zip(norms, numbers, strict=True)]


def _add_up(size: int, numbers: Sequence[float]) -> Totals | None:
    *parts, squares = numbers
    lows, highs = parts[1::3], [-high for high in parts[2::3]]
    return Totals(size, sum(parts[::3]), squares, _min(lows), -_min(highs)) if size else None


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield all elements in vectors of float32 or float64."""
    for batch in batches((t if is_plain(t) else flatten(t) for t in tensors), _SMALL, _MAX_GATHERED):
        if len(batch) > 1:
            yield widen(gather([t if is_plain(t) else widen(t) for t in batch]))  # float8 is not gathered with others
        else:
            flat = flatten_in_memory_order(batch[0])
            if (size := flat.numel()) <= _PIECE:  # a slice costs as much as a small kernel
                yield widen(flat)
            else:
                yield from (widen(flat[start : start + _PIECE]) for start in range(0, size, _PIECE))


def _row_norms(piece: Tensor) -> list[Tensor]:
    """Return the norms of the rows of a piece, and the elements after the last complete row.

    The norm of a long vector would lose digits of similar numbers.
    """
    size = piece.numel()
    if size % _ROW == 0:
        return [torch.linalg.vector_norm(piece.view(-1, _ROW), dim=1)]
    end = size - size % _ROW
    return [torch.linalg.vector_norm(piece[:end].view(-1, _ROW), dim=1), piece[end:]]


def _sum_of_squares(rows: list[Tensor]) -> Tensor:
    wide = torch.cat(rows or [torch.zeros(1, device="cpu")]).double()
    return torch.dot(wide, wide)


def _min(values: Sequence[float]) -> float:
    """Return the minimum, or NaN if any value is NaN, which Python's ``min`` overlooks."""
    return math.nan if any(map(math.isnan, values)) else min(values)


def _moments(tensors: Sequence[Tensor], totals: Totals | None) -> list[Moments]:
    """Return the moments of the stored elements and of the zeros that sparse tensors do not store."""
    stored = [] if totals is None else _moments_of_stored(tensors, totals)
    zeros = count_zeros(tensors, 0 if totals is None else totals.size)
    return [*stored, Moments(zeros, 0.0, 0.0, 0.0, 0.0)] if zeros else stored


def _moments_of_stored(tensors: Sequence[Tensor], totals: Totals) -> list[Moments]:
    """Return moments from totals, or by a second pass if the totals have lost the deviations."""
    size, first, second, low, high = totals
    if not (math.isfinite(low) and math.isfinite(high)):
        return [Moments(size, first / size, second, low, high)]
    if low == high:
        return [Moments(size, low, 0.0, low, high)]
    if _UNDERFLOW < second < math.inf and first * first / size < _CANCELLATION_RATIO * second:
        return [Moments(size, first / size, second - first * first / size, low, high)]
    return [_exact_moments(piece.double(), low, high) for piece in _pieces(tensors)]


def _exact_moments(piece: Tensor, low: float, high: float) -> Moments:
    mean = piece.mean()
    deviations = piece - mean
    return Moments(piece.numel(), mean.item(), torch.dot(deviations, deviations).item(), low, high)


def _norm(tensors: Sequence[Tensor], squares: float) -> float:
    """Return the norm from the sum of squares, or by a second pass if float32 could not hold it."""
    if _UNDERFLOW < squares < math.inf:
        return math.sqrt(squares)
    wide = map(Tensor.double, _pieces(tensors))
    return math.sqrt(sum(torch.dot(piece, piece).item() for piece in wide))
