"""Statistics of many tensors at once, with one transfer to the host.

Each tensor is read piece by piece, small enough to stay in the processor's cache between the few passes over it.
A piece yields its mean, its sum of squared deviations and its extremes in the tensor's own precision (float32 at
least); the pieces are combined in float64 on the host by the pairwise formula of Chan, Golub and LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances" (1979), which keeps the standard deviation right
where the mean is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PIECE = 1 << 18  # elements: 1 MB of float32
_SMALL = 1 << 14  # elements: below this, tensors are gathered into one piece


@dataclass(frozen=True)
class Statistics:
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


def measure(
    buffers: Mapping[str, Sequence[Tensor]], gradients: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, Statistics], dict[str, float]]:
    """Statistics of each named list of buffers, and the L2 norm of each named list of gradients.

    Dense and sparse tensors of any floating or complex dtype and of any layout do; a complex number counts as two
    real ones. NaN and infinity show in the result as they would in a float64 computation.

    Args:
        buffers: For each name the tensors to describe together; empty ones are left out.
        gradients: For each name the tensors whose common norm is wanted.

    Returns:
        The statistics by name and the norms by name; a name without any element has none.

    Example:
        >>> statistics, norms = measure({"exp_avg": [torch.tensor([3.0, 4.0])]}, {"grad": [torch.tensor([6.0, 8.0])]})
        >>> statistics["exp_avg"].norm, statistics["exp_avg"].mean, norms["grad"]
        (5.0, 3.5, 10.0)
    """
    pieces = {name: list(_pieces(tensors)) for name, tensors in buffers.items()}
    vectors = {name: [v for v in map(_vector, tensors) if v.numel()] for name, tensors in gradients.items()}
    scalars = [scalar for each in pieces.values() for piece in each for scalar in _moments(piece)]
    scalars += [norm for each in vectors.values() if each for norm in torch._foreach_norm(each)]
    values = iter(_fetch(scalars))
    statistics = {
        name: _combine([(piece.numel(), next(values), next(values), next(values), next(values)) for piece in each])
        for name, each in pieces.items()
        if each
    }
    norms = {name: math.hypot(*(next(values) for _ in each)) for name, each in vectors.items() if each}
    return statistics, norms


def _vector(tensor: Tensor) -> Tensor:
    """All stored elements as one real vector of float32 or better, without a copy where that is possible."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.flatten()
    return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()


def _pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    small: list[Tensor] = []
    for vector in map(_vector, tensors):
        if vector.numel() < _SMALL:
            small.append(vector)
        else:
            yield from torch.split(vector, _PIECE)
    if small:
        gathered = torch.cat(small) if len(small) > 1 else small[0]
        if gathered.numel():
            yield from torch.split(gathered, _PIECE)


def _moments(piece: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = piece.mean()
    deviation = piece - mean
    low, high = torch.aminmax(piece)
    return mean, torch.dot(deviation, deviation), low, high


def _fetch(scalars: Sequence[Tensor]) -> list[float]:
    if not scalars:
        return []
    if len({(scalar.device, scalar.dtype) for scalar in scalars}) > 1:
        scalars = [scalar.to(scalars[0].device, torch.float64) for scalar in scalars]
    values: list[float] = torch.stack(list(scalars)).tolist()  # the step's one transfer to the host
    return values


def _combine(pieces: Sequence[tuple[int, float, float, float, float]]) -> Statistics:
    count = sum(piece[0] for piece in pieces)
    lows, highs = [piece[3] for piece in pieces], [piece[4] for piece in pieces]
    low, high = _nan_or(min(lows), lows), _nan_or(max(highs), highs)
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        norm = math.nan if math.isnan(low) else math.inf
        return Statistics(norm, sum(piece[1] for piece in pieces) / len(pieces), math.nan, low, high)
    mean = math.fsum(n * average for n, average, *_ in pieces) / count
    squares = math.fsum(m2 + n * (average - mean) ** 2 for n, average, m2, *_ in pieces)
    return Statistics(math.sqrt(squares + count * mean * mean), mean, math.sqrt(squares / count), low, high)


def _nan_or(value: float, values: list[float]) -> float:
    """Python's min and max overlook NaN; torch's do not."""
    return math.nan if any(map(math.isnan, values)) else value
