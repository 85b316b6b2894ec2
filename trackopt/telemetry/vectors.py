"""Tensors of any layout as real vectors, without a copy where that is possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from trackopt.training.sharding import to_local

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_CLASSES = frozenset({Tensor, nn.Parameter})
_WIDE_DTYPES = frozenset({torch.float32, torch.float64})
_DTYPES = _WIDE_DTYPES | {torch.float16, torch.bfloat16}


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and real, and not of a subclass with behaviour of its own."""
    return type(tensor) in _CLASSES and tensor.dtype in _DTYPES and tensor.layout is torch.strided


def vector(tensor: Tensor) -> Tensor:
    """Return all stored elements as one real vector of float32 or float64; the local part of a DTensor."""
    return widen(flatten(tensor))


def flatten(tensor: Tensor) -> Tensor:
    """Return all stored elements as one real vector of the tensor's dtype; the local part of a DTensor."""
    tensor = tensor.detach()
    if not is_plain(tensor):
        tensor = to_local(tensor)
        if tensor.layout is torch.sparse_coo:
            tensor = tensor.coalesce().values()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.flatten()


def widen(vector: Tensor) -> Tensor:
    """Convert to float32 unless the vector is of float32 or float64."""
    return vector if vector.dtype in _WIDE_DTYPES else vector.float()


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """Copy all elements of plain tensors into one vector of the widest of their dtypes."""
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]  # torch leaves it so
    return flat.detach()


def batches(tensors: Iterable[Tensor], small: int, limit: int) -> Iterator[list[Tensor]]:
    """Yield tensors of at least ``small`` elements alone, and others together up to ``limit``; empty ones are skipped.

    Smaller tensors are meant to be gathered only while they are read, so that the copies reuse the same memory.
    """
    batch: list[Tensor] = []
    total = 0
    for tensor in tensors:
        size = tensor.numel()
        if size >= small:
            yield [tensor]
        elif size:
            if batch and total + size > limit:
                yield batch
                batch, total = [], 0
            batch.append(tensor)
            total += size
    if batch:
        yield batch
