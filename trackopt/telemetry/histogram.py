"""Histograms of many tensors taken as one, in the form that TensorBoard uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trackopt.journal import Histogram
from trackopt.telemetry.vectors import vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MAX_BINS = 64


def histogram(tensors: Sequence[Tensor]) -> Histogram | None:
    """Return the histogram of all finite elements in at most 64 bins of equal width; ``None`` without any.

    Example:
        >>> result = histogram([torch.tensor([0.0, 1.0, 1.0, float("nan")])])
        >>> result.counts[0], result.counts[-1], result.limits[-1], result.num
        (1, 2, 1.0, 3)
    """
    vectors = [v[torch.isfinite(v)].cpu() for v in map(vector, tensors)]
    values = torch.cat(vectors) if vectors else torch.empty(0, device="cpu")
    if not values.numel():
        return None
    low, high = (bound.item() for bound in torch.aminmax(values))
    wide = values.double()
    limits: list[float] = [high]
    counts: list[float] = [values.numel()]
    if low < high:
        limits = torch.linspace(low, high, _MAX_BINS + 1, dtype=torch.float64, device="cpu")[1:].tolist()
        counts = torch.histc(wide, _MAX_BINS, low, high).long().tolist()
    total, squares = wide.sum().item(), torch.dot(wide, wide).item()
    return Histogram(limits, counts, min=low, max=high, sum=total, sum_squares=squares, num=values.numel())
