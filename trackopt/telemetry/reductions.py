"""Sums, extremes, inner products and distances of vectors in the host's memory, added in float64.

NumKong's kernels do it at the speed of memory. Where it has no wheel, or computes something else than torch does,
torch's kernels are used, which take several times as long.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

#: The names that NumKong has for dtypes.
NAMES: Final = {torch.float32: "float32", torch.float64: "float64"}
_PIECE = 1 << 16  # elements, which stay in the cache between two passes


class Sums(NamedTuple):
    """Sums over the elements of a vector, and the extremes, which are NaN if any element is."""

    sum: float
    squares: float
    low: float
    high: float


class Reductions(Protocol):
    """What is computed of vectors of float32 or float64: contiguous tensors of the CPU with at least one element."""

    def sums(self, vector: Tensor) -> Sums:
        """Return the sums over all elements, and the extremes."""

    def squares(self, vector: Tensor) -> float:
        """Return the sum of squares."""

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Return the inner product of two vectors of the same dtype and size."""

    def squared_distance(self, a: Tensor, b: Tensor) -> float:
        """Return the sum of the squared differences of two vectors of the same dtype and size."""


class TorchReductions:
    """Reductions by torch, in pieces that are widened to float64."""

    def sums(self, vector: Tensor) -> Sums:
        """See `Reductions`."""
        total = squares = 0.0
        for piece in _wide_pieces(vector):
            total += piece.sum().item()
            squares += torch.dot(piece, piece).item()
        return Sums(total, squares, *_extremes(vector))

    def squares(self, vector: Tensor) -> float:
        """See `Reductions`."""
        return sum(torch.dot(piece, piece).item() for piece in _wide_pieces(vector))

    def dot(self, a: Tensor, b: Tensor) -> float:
        """See `Reductions`."""
        return sum(torch.dot(x, y).item() for x, y in zip(_wide_pieces(a), _wide_pieces(b), strict=True))

    def squared_distance(self, a: Tensor, b: Tensor) -> float:
        """See `Reductions`."""
        differences = (x - y for x, y in zip(_wide_pieces(a), _wide_pieces(b), strict=True))
        return sum(torch.dot(piece, piece).item() for piece in differences)


def _wide_pieces(vector: Tensor) -> Iterator[Tensor]:
    flat = vector.detach().flatten()
    return (flat[start : start + _PIECE].double() for start in range(0, flat.numel(), _PIECE))


def _extremes(vector: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(vector.detach())
    return low.item(), high.item()


class NumKongReductions:
    """Reductions by NumKong.

    Its kernels take views: addresses with a size and a dtype, which keep no tensor alive.

    Args:
        numkong: The module.
    """

    def __init__(self, numkong: Any) -> None:
        self.view = numkong.from_pointer
        self.moments = numkong.moments
        self.minmax = numkong.minmax
        self.norm = numkong.norm
        self.dot_of_views = numkong.dot
        self.distance_of_views = numkong.sqeuclidean

    def views(self, vector: Tensor) -> list[Any]:
        """Return views of the parts of a vector that stay in the cache between two passes."""
        size, address, name = vector.numel(), vector.data_ptr(), NAMES[vector.dtype]
        if size <= _PIECE:
            return [self.view(address, size, name)]
        item_size = vector.element_size()
        return [self.view(address + i * item_size, min(_PIECE, size - i), name) for i in range(0, size, _PIECE)]

    def sums_of_views(self, views: Sequence[Any]) -> tuple[float, float, float, float]:
        """Return the sum, the sum of squares, the minimum and the maximum, which overlook NaN: the sum is NaN then."""
        moments, minmax = self.moments, self.minmax
        total, squares, low, high = 0.0, 0.0, math.inf, -math.inf
        for view in views:
            if bounds := minmax(view):  # the first pass: it computes more, and memory is slower than the cache
                if bounds[0] < low:
                    low = bounds[0]
                if bounds[2] > high:
                    high = bounds[2]
            part, square = moments(view)
            total += part
            squares += square
        return total, squares, low, high

    def sums(self, vector: Tensor) -> Sums:
        """See `Reductions`."""
        total, squares, low, high = self.sums_of_views(self.views(vector))
        if total != total:
            low, high = _extremes(vector)
        return Sums(total, squares, low, high)

    def squares(self, vector: Tensor) -> float:
        """See `Reductions`."""
        norm: float = self.norm(self._whole(vector))
        return norm * norm

    def dot(self, a: Tensor, b: Tensor) -> float:
        """See `Reductions`."""
        result: float = self.dot_of_views(self._whole(a), self._whole(b))
        return result

    def squared_distance(self, a: Tensor, b: Tensor) -> float:
        """See `Reductions`."""
        result: float = self.distance_of_views(self._whole(a), self._whole(b))
        return result

    def _whole(self, vector: Tensor) -> Any:
        return self.view(vector.data_ptr(), vector.numel(), NAMES[vector.dtype])


def agree(ours: Reductions, reference: Reductions) -> bool:
    """Return whether two implementations compute the same of some vectors, to 12 digits."""
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype in NAMES:
        noise = torch.randn(5003, generator=generator, dtype=dtype, device="cpu") + 3
        for vector in (noise, noise * 1e-20, torch.full((1001,), 0.1, dtype=dtype, device="cpu"), noise[:1]):
            other = vector.flip(0).contiguous()
            found, expected = (
                [*r.sums(vector), r.squares(vector), r.dot(vector, other), r.squared_distance(vector, other)]
                for r in (ours, reference)
            )
            if not all(map(_is_close, found, expected)):
                return False
    strange = torch.tensor([1.0, math.inf, -2.0, math.nan, -math.inf, 3.0], dtype=torch.float32, device="cpu")
    return all(repr(ours.sums(strange[:n])) == repr(reference.sums(strange[:n])) for n in range(1, 7))


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def _choose() -> Reductions:
    reference = TorchReductions()
    try:
        import numkong

        ours = NumKongReductions(numkong)
        return ours if agree(ours, reference) else reference
    except Exception:  # noqa: BLE001 - no wheel, or another interface
        return reference


reductions: Final = _choose()
