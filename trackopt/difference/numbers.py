"""How far two tensors are apart, read side by side in chunks: memory does not grow with them.

Sums are kept in float64. Elements whose bits are equal are equal, NaN and infinity too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive import Archive
from trackopt.archive import tensors as values

if TYPE_CHECKING:
    from trackopt.archive.nodes import Tensor

_CHUNK = 2 << 20


@dataclass(frozen=True)
class Numbers:
    """What comparing tensors adds up to; that of several tensors is the sum of theirs.

    Attributes:
        aa: Sum of squares of the one.
        bb: Sum of squares of the other.
        ab: Sum of their products.
        dd: Sum of squares of their difference.
        max_abs: Largest difference of an element; NaN if one became NaN.
        differing: Elements whose bits differ.
        elements: All elements.
    """

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    max_abs: float = 0.0
    differing: int = 0
    elements: int = 0

    @property
    def rel_l2(self) -> float:
        """Length of the difference over the length of the first; infinite if that is zero."""
        if self.aa == 0:
            return math.inf if self.dd else 0.0
        return math.sqrt(self.dd / self.aa)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two; None if one of them is zero."""
        if self.aa == 0 or self.bb == 0:
            return None
        cosine = self.ab / math.sqrt(self.aa) / math.sqrt(self.bb)
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine

    def __add__(self, other: Numbers) -> Numbers:
        worst = math.nan if math.isnan(other.max_abs) else max(self.max_abs, other.max_abs)
        return Numbers(
            self.aa + other.aa,
            self.bb + other.bb,
            self.ab + other.ab,
            self.dd + other.dd,
            math.nan if math.isnan(self.max_abs) else worst,
            self.differing + other.differing,
            self.elements + other.elements,
        )


@dataclass(frozen=True)
class Side:
    """A tensor and the archive to read it from."""

    archive: Archive
    tensor: Tensor

    def raw(self) -> Any:
        """Its stored bytes, in chunks."""
        return values.raw(self.archive.source, self.tensor, _CHUNK)

    def decode(self, data: Any) -> Any:
        """What a chunk of them means."""
        return values.values(data, self.tensor, self.archive.source.byteorder)


def compare(a: Side, b: Side) -> Numbers | None:
    """How far two tensors of the same shape and dtype are apart; None if they are equal.

    Raises:
        ArchiveError: Values of one of them are not in its file.
    """
    a, b = _in_memory_order(a, b)
    bits = _comparable(a, b)
    if bits and all(x == y for x, y in zip(a.raw(), b.raw(), strict=True)):
        return None
    total = Numbers()
    for x, y in zip(a.raw(), b.raw(), strict=True):
        total += _chunk(a.decode(x), b.decode(y), _differing(x, y, a.tensor.itemsize) if bits else None)
    return total if total.differing else None


def norm(side: Side) -> Numbers:
    """The numbers of a tensor compared with itself."""
    total = 0.0
    for data in side.raw():
        total += _dot(*([_wide(side.decode(data))] * 2))
    return Numbers(total, total, total, elements=side.tensor.elements)


def _in_memory_order(a: Side, b: Side) -> tuple[Side, Side]:
    """Both with their dimensions in the order that they lie in the file, where that is the same for both.

    The sums do not depend on the order, and what is contiguous is read in chunks.
    """
    if a.tensor.stride != b.tensor.stride or a.tensor.contiguous:
        return a, b
    order = sorted(range(len(a.tensor.stride)), key=lambda i: -a.tensor.stride[i])
    return _permuted(a, order), _permuted(b, order)


def _permuted(side: Side, order: list[int]) -> Side:
    shape, stride = ([getattr(side.tensor, name)[i] for i in order] for name in ("shape", "stride"))
    return Side(side.archive, replace(side.tensor, shape=tuple(shape), stride=tuple(stride)))


def _comparable(a: Side, b: Side) -> bool:
    """Whether equal bytes mean equal values."""
    return (a.archive.source.byteorder, a.tensor.conj, a.tensor.neg) == (
        b.archive.source.byteorder,
        b.tensor.conj,
        b.tensor.neg,
    )


def _differing(x: Any, y: Any, itemsize: int) -> Any:
    """Which elements differ in a bit."""
    import numpy as np

    word = min(itemsize, 8)
    different = np.frombuffer(x, f"u{word}") != np.frombuffer(y, f"u{word}")
    return different if word == itemsize else different.reshape(-1, itemsize // word).any(axis=1)


def _chunk(x: Any, y: Any, differing: Any) -> Numbers:
    import numpy as np

    if differing is None:
        differing = (x != y) & ~((x != x) & (y != y))
    count = int(np.count_nonzero(differing))
    x, y = _wide(x), _wide(y)
    if not count:
        same = _dot(x, x)
        return Numbers(same, same, same, elements=x.size)
    with np.errstate(all="ignore"):
        gap = np.subtract(y, x)
        if count < gap.size:
            gap[~differing] = 0  # infinity less infinity is no difference
        return Numbers(_dot(x, x), _dot(y, y), _dot(x, y), _dot(gap, gap), float(np.max(np.abs(gap))), count, x.size)


def _wide(array: Any) -> Any:
    return array.astype("c16" if array.dtype.kind == "c" else "f8")


def _dot(x: Any, y: Any) -> float:
    import numpy as np

    with np.errstate(all="ignore"):
        return float(np.vdot(x, y).real)
