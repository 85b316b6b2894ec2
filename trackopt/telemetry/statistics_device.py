"""Statistics of tensors on a device, computed without waiting for it: there the number of kernels counts."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.telemetry.vectors import (
    batches,
    count_zeros,
    flatten_in_memory_order,
    gather,
    is_plain,
    vector,
    widen,
)
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
    sizes: dict[str, list[int]] = {name: [] for name in buffers}
    scalars: list[Tensor] = []
    for name, tensors in buffers.items():
        for part in _batches(tensors):
            values = widen(gather(part) if len(part) > 1 else flatten_in_memory_order(part[0]))
            variance, mean = torch.var_mean(values, correction=0)
            scalars += [mean, variance, *torch.aminmax(values)]
            sizes[name].append(values.numel())
        if zeros := count_zeros(tensors, sum(sizes[name])):
            scalars += torch.zeros(4, device=tensors[0].device).unbind()
            sizes[name].append(zeros)
    norms = {name: _norms(tensors) for name, tensors in vectors.items()}
    scalars += chain.from_iterable(norms.values())
    return sizes, scalars, {name: len(values) for name, values in norms.items()}


def moments(size: int, mean: float, variance: float, low: float, high: float) -> Moments:
    """Return the moments of a part from its size and its scalars."""
    return Moments(size, mean, variance * size, low, high)


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for on_device in by_device.values():  # one by one: what was dequantized is freed before the next
        yield from batches((t if is_plain(t) else vector(t) for t in on_device), _SMALL, _MAX_GATHERED)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms in float32 or float64; float16 and bfloat16 are not copied for it: a device's memory is full."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    plain = [tensor.detach() for tensor in filled if is_plain(tensor)]
    narrow = [tensor for tensor in plain if tensor.dtype in _NARROW]
    wide = [tensor for tensor in plain if tensor.dtype not in _NARROW]
    norms = [torch.linalg.vector_norm(vector(tensor)) for tensor in filled if not is_plain(tensor)]
    norms += torch._foreach_norm(narrow, 2, torch.float32) if narrow else ()
    norms += torch._foreach_norm(wide) if wide else ()
    return norms
