"""Checksums of live state, by which ranks compare it without sending it."""

from __future__ import annotations

from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from trackopt.checkpoint.encoding import StateEncoder
from trackopt.checkpoint.pickler import dump_tree
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

_SAMPLES = 1024  # elements of a large tensor; a training that is not synchronized changes nearly all of them
_PLAIN = (int, float, bool, str, type(None))
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(values: Mapping[Any, Any], *, complete: bool) -> dict[Any, bytes]:
    """Return a checksum of each value, of tensors on any device and others.

    Args:
        values: The values by a key.
        complete: Whether to read every element of a tensor; otherwise a sample of it.
    """
    result: dict[Any, bytes] = {}
    pieces: list[tuple[Hashable, Tensor]] = []
    for key, value in values.items():
        if type(value) in _PLAIN:
            result[key] = repr(value).encode()
            continue
        parts = _tensor_parts(value)
        if parts is None:
            result[key] = checksum_of_state(value)
        else:
            result[key] = repr([(tuple(part.shape), part.dtype) for part in parts]).encode()
            pieces += [(key, piece) for part in parts for piece in _pieces(part, complete=complete)]
    for key, piece_sum in _checksums_of_bytes(pieces):
        result[key] += piece_sum
    return {key: blake2b(each, digest_size=8).digest() for key, each in result.items()}


def summarize(sums: Mapping[Any, bytes]) -> bytes:
    """Return one checksum of many, and of their keys."""
    digest = blake2b(digest_size=16)
    for key, own in sums.items():
        digest.update(repr(key).encode())
        digest.update(own)
    return digest.digest()


def checksum_of_state(state: Any) -> bytes:
    """Return a checksum of everything in a state; an empty one if it cannot be saved."""
    try:
        pickled = dump_tree({"": StateEncoder().encode(state, "")})
    except UsageError:  # the save names it
        return b""
    digest = blake2b(pickled.data)
    for storage in pickled.storages:
        content: Any = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy()
        digest.update(content)
    return digest.digest()


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _tensor_parts(value: Any) -> list[Tensor] | None:
    """Return a tensor, or the plain ones inside a subclass; ``None`` for other values and layouts."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
        return None
    if type(value) in (Tensor, torch.nn.Parameter):
        return [value.detach()]
    if not hasattr(value, "__tensor_flatten__"):
        return None
    names, _ = value.__tensor_flatten__()
    parts = [_tensor_parts(getattr(value, name)) for name in names]
    return None if None in parts else [part for inner in parts for part in inner or ()]


def _pieces(tensor: Tensor, *, complete: bool) -> Iterator[Tensor]:
    """Yield bytes that stand for a tensor, on its device."""
    if not tensor.numel() or tensor.is_meta:
        return
    flat = _flat_integers(tensor)
    if tensor.numel() <= _SAMPLES:
        yield flat.view(torch.uint8)
        return
    yield flat[:: tensor.numel() // _SAMPLES].contiguous().view(torch.uint8)
    if complete:
        yield flat.sum(dtype=torch.int64).reshape(1).view(torch.uint8)


def _flat_integers(tensor: Tensor) -> Tensor:
    """Return the elements in one dimension, as integers; without a copy if they are dense in any order."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if not real.is_contiguous():
        real = real.permute(sorted(range(real.ndim), key=real.stride, reverse=True))
    return real.reshape(-1).view(_INTEGERS[real.element_size()])


def _checksums_of_bytes(pieces: list[tuple[Hashable, Tensor]]) -> Iterator[tuple[Any, bytes]]:
    """Yield the checksum of each piece; the pieces of a device are transferred together."""
    by_device: dict[torch.device, list[tuple[Hashable, Tensor]]] = {}
    for key, piece in pieces:
        by_device.setdefault(piece.device, []).append((key, piece))
    for own in by_device.values():
        content: Any = torch.cat([piece for _, piece in own]).cpu().numpy()
        ends = accumulate((len(piece) for _, piece in own), initial=0)
        for (key, _), (start, end) in zip(own, pairwise(ends), strict=True):
            yield key, crc32(content[start:end]).to_bytes(4, "little")
