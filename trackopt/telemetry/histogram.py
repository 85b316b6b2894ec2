"""Histograms of many tensors taken as one, in the form that TensorBoard uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.journal import Histogram
from trackopt.telemetry.vectors import count_zeros, vector

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_BINS = 64


def histogram(tensors: Sequence[Tensor]) -> Histogram | None:
    """Return the histogram of all finite elements in at most 64 bins of equal width; ``None`` without any.

    Elements that sparse tensors do not store are zeros.

    Example:
        >>> result = histogram([torch.tensor([0.0, 1.0, 1.0, float("nan")])])
        >>> result.counts[0], result.counts[-1], result.limits[-1], result.num
        (1, 2, 1.0, 3)
    """
    parts: list[Tensor] = []
    stored = 0
    for flat in map(vector, tensors):
        stored += flat.numel()
        parts.append(flat[torch.isfinite(flat)].cpu())
    zeros = count_zeros(tensors, stored)
    values = torch.cat([*parts, torch.zeros(min(zeros, 1), device="cpu")])  # one stands for all
    if not values.numel():
        return None
    low, high = (bound.item() for bound in torch.aminmax(values))
    wide = values.double()
    num = values.numel() + max(zeros - 1, 0)
    limits: list[float] = [high]
    counts: list[float] = [num]
    if low < high:
        limits = torch.linspace(low, high, _MAX_BINS + 1, dtype=torch.float64, device="cpu")[1:].tolist()
        bins = torch.histc(wide, _MAX_BINS, low, high)
        if zeros > 1:
            bins += (zeros - 1) * torch.histc(torch.zeros_like(wide[:1]), _MAX_BINS, low, high)
        counts = bins.long().tolist()
    total, squares = wide.sum().item(), torch.dot(wide, wide).item()
    return Histogram(limits, counts, min=low, max=high, sum=total, sum_squares=squares, num=num)
