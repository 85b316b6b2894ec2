"""Totals of tensors in the host's memory, read piece by piece: one stays in the cache between the passes over it."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.telemetry.statistics_small import Totals, gather, is_dtensor, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# In elements.
_SMALL = 1 << 15  # smaller tensors are copied together,
_GATHERED = 1 << 17  # up to this size
_PIECE = 1 << 18  # of what is read several times; 1 MB of float32
_LONG = 1 << 20  # of what is read once
_ROW = 256  # whose squares are added in the order of memory


def totals(
    buffers: Iterable[Sequence[Tensor]], vectors: Iterable[Sequence[Tensor]]
) -> tuple[list[Totals | None], list[float | None]]:
    """The totals of each list of buffers, and the sum of squares of each list of vectors; none of an empty list.

    What float32 cannot hold of a piece's sum or a row's squares is lost: see `statistics`.
    """
    scalars: list[Tensor] = []
    sizes: list[tuple[int, int]] = []  # elements and pieces of each list of buffers
    for tensors in buffers:
        rows: list[Tensor] = []
        size, begin = 0, len(scalars)
        for piece in pieces(tensors):
            size += piece.numel()
            rows += _rows(piece)
            scalars += [piece.sum(), *torch.aminmax(piece)]
        sizes.append((size, (len(scalars) - begin) // 3))
        scalars.append(_squares(rows))
    lengths = [[row for piece in pieces(tensors, _LONG) for row in _rows(piece)] for tensors in vectors]
    scalars += map(_squares, lengths)
    numbers = iter(torch.stack(scalars).tolist() if scalars else ())
    found = [_totals(size, [*islice(numbers, 3 * count + 1)]) for size, count in sizes]
    return found, [number if rows else None for rows, number in zip(lengths, numbers, strict=True)]


def _totals(size: int, numbers: Sequence[float]) -> Totals | None:
    *parts, squares = numbers
    lows, highs = parts[1::3], [-high for high in parts[2::3]]
    return Totals(size, sum(parts[::3]), squares, _lowest(lows), -_lowest(highs)) if size else None


def flat(tensor: Tensor) -> Tensor:
    """All stored elements as one real vector, without a copy where that is possible.

    Of a tensor that is spread over processes (DTensor) the part that is here.
    """
    tensor = tensor.detach()
    if not is_plain(tensor):
        if is_dtensor(tensor):
            tensor = tensor.to_local()
        if tensor.layout is torch.sparse_coo:
            tensor = tensor.coalesce().values()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.flatten()


def real(vector: Tensor) -> Tensor:
    """The same in float32 or better."""
    return vector if vector.dtype in {torch.float32, torch.float64} else vector.float()


def pieces(tensors: Iterable[Tensor], longest: int = _PIECE) -> Iterator[Tensor]:
    """All elements, in vectors of float32 or better that are read one after the other.

    Small tensors are copied together only while they are read, so that the copies take turns in the same memory.
    """
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        vector = tensor if is_plain(tensor) else flat(tensor)
        elements = vector.numel()
        if elements > longest:
            vector = _line(vector)
            yield from (real(vector[start : start + longest]) for start in range(0, elements, longest))
        elif elements >= _SMALL:
            yield real(_line(vector))
        elif elements:
            if waiting and size + elements > _GATHERED:
                yield real(gather(waiting))
                waiting, size = [], 0
            waiting.append(vector if is_plain(vector) else real(vector))  # float8 is not gathered with others
            size += elements
    if waiting:
        yield real(gather(waiting))


def _line(tensor: Tensor) -> Tensor:
    """All elements in the order of memory, so that channels-last and transposed tensors need no copy either."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return tensor.flatten()


def _rows(piece: Tensor) -> list[Tensor]:
    """Numbers whose squares add up to those of a piece: the norm of each row of it, and what makes no whole row.

    The norm of a long vector would lose digits of like numbers.
    """
    whole = piece.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(piece[:whole].view(-1, _ROW), dim=1)
    return [norms, piece[whole:]] if whole < piece.numel() else [norms]


def _squares(rows: list[Tensor]) -> Tensor:
    wide = torch.cat(rows or [torch.zeros(1, device="cpu")]).double()
    return torch.dot(wide, wide)


def _lowest(values: Sequence[float]) -> float:
    """Python's min overlooks NaN; torch's does not."""
    return math.nan if any(map(math.isnan, values)) else min(values)
