"""Totals of many small tensors on the CPU: gathered into one vector and read by NumPy, whose calls cost least."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.tensor import DTensor

_MAX_ELEMENTS = 1 << 14  # elements of one list
_CLASSES = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


class Totals(NamedTuple):
    """Of all elements of a list of tensors; sums in float64."""

    size: int
    sum: float
    squares: float
    low: float
    high: float


def totals(lists: Sequence[Sequence[Tensor]]) -> list[Totals | None]:
    """The totals of each list; ``None`` where it is empty, large, or holds other than plain real tensors of the CPU."""
    sizes = [size_of(tensors) for tensors in lists]
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


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of some plain tensors in one vector, of the widest of their dtypes."""
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]  # torch leaves it so
    return flat.detach()


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense tensor of real numbers without behaviour of its own."""
    return type(tensor) in _CLASSES and tensor.dtype in _DTYPES and tensor.layout is torch.strided


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, of which each process has a part; torch's module for these is not imported for it."""
    return hasattr(tensor, "to_local")


def size_of(tensors: Sequence[Tensor]) -> int:
    """How many elements a list has; 0 where it is not for this module."""
    total = 0
    for tensor in tensors:
        if not (tensor.is_cpu and is_plain(tensor)):
            return 0
        total += tensor.numel()
        if total > _MAX_ELEMENTS:
            return 0
    return total
