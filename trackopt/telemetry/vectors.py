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
_NARROW_DTYPES = frozenset({torch.float16, torch.bfloat16})
_DTYPES = _WIDE_DTYPES | _NARROW_DTYPES
_PART = 1 << 16  # elements that are widened at once, and then lie in the cache
_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and real, and not of a subclass with behaviour of its own."""
    return type(tensor) in _CLASSES and tensor.dtype in _DTYPES and tensor.layout is torch.strided


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a tensor stores codes, from which its ``dequantize`` computes the values."""
    return tensor.is_quantized or type(tensor).dequantize is not Tensor.dequantize


def is_measurable(tensor: Tensor) -> bool:
    """Return whether a tensor stands for real or complex numbers that can be read.

    Meta and fake tensors hold none, integers are codes or indices, and some subclasses of tensors refuse to be read.
    """
    if is_plain(tensor):
        return not tensor.is_meta
    if not (tensor.is_floating_point() or tensor.is_complex() or is_quantized(tensor)):
        return False
    try:
        start = widen(flatten(tensor)[:1])
    except Exception:  # noqa: BLE001 - whatever a subclass raises
        return False
    return is_plain(start) and not start.is_meta


def describe(tensor: Tensor) -> str:
    """Return what kind of tensor it is, to say why it is not measured."""
    if tensor.is_meta:
        return "a tensor on the meta device"
    return f"a tensor of {tensor.dtype}" if type(tensor) in _CLASSES else f"a {type(tensor).__name__}"


def vector(tensor: Tensor) -> Tensor:
    """Return all stored elements as one real vector of float32 or float64; the local part of a DTensor."""
    return widen(flatten(tensor))


def flatten(tensor: Tensor) -> Tensor:
    """Return all stored elements as one real vector of the tensor's dtype; the local part of a DTensor.

    Those of a quantized tensor are dequantized.
    """
    if is_plain(tensor):
        return tensor.detach().flatten()
    tensor = to_plain(to_local(tensor))
    if tensor.layout is torch.sparse_coo:
        # The sum of an element's entries is not rounded to 16 bits.
        is_summed = tensor.is_coalesced() or tensor.dtype not in _NARROW_DTYPES
        tensor = (tensor.detach() if is_summed else tensor.detach().float()).coalesce().values()
    elif tensor.layout in _COMPRESSED:
        tensor = tensor.values()
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.flatten()


def to_plain(tensor: Tensor) -> Tensor:
    """Return the values as a tensor of no subclass; a copy if the tensor is of one."""
    if is_quantized(tensor):
        tensor = tensor.dequantize()
    if type(tensor) in _CLASSES:
        return tensor
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    plain.copy_(tensor)
    return plain


def is_vector(tensor: Tensor) -> bool:
    """Return whether a tensor lies in one piece of memory as numbers of float32 or float64."""
    return (
        type(tensor) in _CLASSES
        and tensor.dtype in _WIDE_DTYPES
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def vectors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield all stored elements of a tensor in parts for which ``is_vector`` holds."""
    flat = flatten_in_memory_order(tensor) if is_plain(tensor) else flatten(tensor).contiguous()
    for start in range(0, flat.numel(), _PART):
        yield widen(flat[start : start + _PART])


def flatten_in_memory_order(tensor: Tensor) -> Tensor:
    """Return all elements in the order of memory, so that channels-last and transposed tensors need no copy either."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return tensor.flatten().contiguous().resolve_neg()


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Return the number of real elements, stored or not; a complex one counts as two."""
    return sum(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors)


def count_zeros(tensors: Sequence[Tensor], stored: int) -> int:
    """Return the number of elements that sparse tensors do not store, if all tensors together store so many."""
    return 0 if all(tensor.layout is torch.strided for tensor in tensors) else count_elements(tensors) - stored


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
