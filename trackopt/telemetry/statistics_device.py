"""Statistics of tensors on a device, computed without waiting for it: there the number of kernels counts."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.telemetry.vectors import batches, flatten, gather, is_plain, vector, widen
from trackopt.utils.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_NARROW = frozenset({torch.float16, torch.bfloat16})

# In elements: smaller tensors are gathered, up to this size.
_SMALL, _MAX_GATHERED = 1 << 20, 1 << 22


def launch(
    buffers: Mapping[str, Sequence[Tensor]], vectors: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[int]], list[Tensor], dict[str, int]]:
    """Start to compute the moments of buffers and the norms of vectors.

    Returns:
        The sizes of the parts of each list of buffers; scalars on devices, first the mean, variance, minimum and
        maximum of each part, then the norms; the number of norms of each list of vectors.
    """
    parts = {name: list(_batches(tensors)) for name, tensors in buffers.items()}
    norms = {name: _norms(tensors) for name, tensors in vectors.items()}
    scalars = []
    for part in chain.from_iterable(parts.values()):
        values = widen(gather(part) if len(part) > 1 else part[0])
        variance, mean = torch.var_mean(values, correction=0)
        scalars += [mean, variance, *torch.aminmax(values)]
    scalars += chain.from_iterable(norms.values())
    sizes = {name: [sum(map(Tensor.numel, part)) for part in batches] for name, batches in parts.items()}
    return sizes, scalars, {name: len(values) for name, values in norms.items()}


def moments(size: int, mean: float, variance: float, low: float, high: float) -> Moments:
    """Return the moments of a part from its size and its scalars."""
    return Moments(size, mean, variance * size, low, high)


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(flatten(tensor))
    for flat in by_device.values():
        yield from batches(flat, _SMALL, _MAX_GATHERED)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms in float32 or float64; float16 and bfloat16 are not copied for it: a device's memory is full."""
    plain = [tensor.detach() if is_plain(tensor) else vector(tensor) for tensor in tensors]
    narrow = [tensor for tensor in plain if tensor.numel() and tensor.dtype in _NARROW]
    wide = [tensor for tensor in plain if tensor.numel() and tensor.dtype not in _NARROW]
    norms = list(torch._foreach_norm(narrow, 2, torch.float32)) if narrow else []
    return norms + list(torch._foreach_norm(wide)) if wide else norms
